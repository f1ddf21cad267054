<#ftl output_format="plainText">
<#-- The text part of html/email-update-confirmation.ftl. -->
<#import "template.ftl" as layout>
<#if (user.attributes.email_verify_url)?has_content>
<#global link = user.attributes.email_verify_url?replace("/account/verify", "/account/address") + "?" + link?keep_after("?")>
</#if>
<@layout.mail msg("addressIntro", realmName) msg("addressNotMe") />
