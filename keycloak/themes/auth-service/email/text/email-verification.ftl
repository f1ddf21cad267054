<#ftl output_format="plainText">
<#import "template.ftl" as layout>
<#import "registration.ftl" as mail>
<#if (user.attributes.email_verify_token)?has_content && (user.attributes.email_verify_url)?has_content>
<@mail.registration />
<#else>
<@layout.mail msg("addressIntro", realmName) msg("addressNotMe") />
</#if>
