<#-- An administrator, or this service, asks for something: for a password, or for anything else. The link is Keycloak's. -->
<#import "template.ftl" as layout>
<#assign actions = requiredActions![]>
<#if actions?seq_contains("UPDATE_PASSWORD")>
<@layout.mail msg("passwordTitle") msg("passwordIntro", realmName) msg("passwordButton") msg("passwordNotMe") />
<#elseif actions?size == 0>
<#-- This service tells that a credential or the address was changed. There is nothing to do with the link. -->
<@layout.emailLayout msg("noticeIntro", realmName)>
<@layout.title msg("noticeTitle") />
<p style="margin:0;">${msg("noticeIntro", realmName)}</p>
<p style="margin:16px 0 0;">${msg("noticeNotMe")}</p>
</@layout.emailLayout>
<#else>
<@layout.mail msg("actionsTitle") msg("actionsIntro", realmName) msg("actionsButton") msg("actionsNotMe")>
<ul><#list actions as action><li>${msg("requiredAction." + action)?remove_beginning("requiredAction.")}</li></#list></ul>
</@layout.mail>
</#if>
