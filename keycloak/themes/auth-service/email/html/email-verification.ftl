<#import "template.ftl" as layout>
<#import "registration.ftl" as mail>
<#if (user.attributes.email_verify_token)?has_content && (user.attributes.email_verify_url)?has_content>
<@mail.registration />
<#else>
<#-- Keycloak's own question, for example after somebody changed the address of an account. -->
<@layout.mail msg("registrationTitle") msg("addressIntro", realmName) msg("registrationButton") msg("addressNotMe") />
</#if>
