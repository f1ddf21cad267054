<#--
  An administrator, or this service, asks for something: for the password of a registration, of an invited user (whose address the link confirms as well,
  hence VERIFY_EMAIL), a forgotten password, or anything else.
-->
<#import "template.ftl" as layout>
<#import "registration.ftl" as mail>
<#assign actions = requiredActions![]>
<#if (user.attributes.email_verify_token)?has_content && (user.attributes.email_verify_url)?has_content>
<@mail.registration key=link?keep_after("key=")?keep_before("&") />
<#elseif actions?seq_contains("UPDATE_PASSWORD") && actions?seq_contains("VERIFY_EMAIL")>
<@layout.mail msg("invitationTitle") msg("invitationIntro", realmName) msg("passwordButton") msg("invitationNotMe") />
<#elseif actions?seq_contains("UPDATE_PASSWORD")>
<@layout.mail msg("passwordTitle") msg("passwordIntro", realmName) msg("passwordButton") msg("passwordNotMe") />
<#else>
<@layout.mail msg("actionsTitle") msg("actionsIntro", realmName) msg("actionsButton") msg("actionsNotMe")>
<ul><#list actions as action><li>${msg("requiredAction." + action)?remove_beginning("requiredAction.")}</li></#list></ul>
</@layout.mail>
</#if>
