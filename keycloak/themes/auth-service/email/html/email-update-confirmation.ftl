<#--
  The question whether an address is really the new one of an account. Keycloak changes it as soon as its link is opened, also by a scanner of mails. So the
  mail leads to this service's page, which has Keycloak's link as a button. An account that this service has not made has Keycloak's link.
-->
<#import "template.ftl" as layout>
<#if (user.attributes.email_verify_url)?has_content>
<#global link = user.attributes.email_verify_url?replace("/account/verify", "/account/address") + "?" + link?keep_after("?")>
</#if>
<@layout.mail msg("registrationTitle") msg("addressIntro", realmName) msg("addressButton") msg("addressNotMe") />
