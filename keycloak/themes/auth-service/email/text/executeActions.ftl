<#ftl output_format="plainText">
<#import "template.ftl" as layout>
<#import "registration.ftl" as mail>
<#assign actions = requiredActions![]>
<#if (user.attributes.email_verify_token)?has_content && (user.attributes.email_verify_url)?has_content>
<@mail.registration key=link?keep_after("key=")?keep_before("&") />
<#elseif actions?seq_contains("UPDATE_PASSWORD") && actions?seq_contains("VERIFY_EMAIL")>
<@layout.mail msg("invitationIntro", realmName) msg("invitationNotMe") />
<#elseif actions?seq_contains("UPDATE_PASSWORD")>
<@layout.mail msg("passwordIntro", realmName) msg("passwordNotMe") />
<#else>
<@layout.mail msg("actionsIntro", realmName) msg("actionsNotMe")>

<#list actions as action>
- ${msg("requiredAction." + action)?remove_beginning("requiredAction.")}
</#list>
</@layout.mail>
</#if>
