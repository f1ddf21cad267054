<#--
  The mail of a registration, for email-verification.ftl and executeActions.ftl. Link and code are this service's, not Keycloak's: the user is disabled,
  and Keycloak's link would say so. `key` is empty, or Keycloak's action token, with which a password is chosen once the address is confirmed.
-->
<#import "template.ftl" as layout>
<#macro registration key="">
  <#local page = user.attributes.email_verify_url>
  <#local query = "?token=" + user.attributes.email_verify_token?url("UTF-8")>
  <#local href = page + query + key?has_content?then("&key=" + key?url("UTF-8"), "")>
  <#local code = (user.attributes.email_verify_code)!"">
<@layout.emailLayout>
<@layout.title msg("registrationTitle") />
<p style="margin:0;">${msg("registrationIntro", realmName)}<#if key?has_content> ${msg("registrationPassword")}</#if></p>
<@layout.button href msg("registrationButton") />
<#if code?has_content>
<p style="margin:0 0 8px;">${msg("registrationCode")} <a href="${page}">${page}</a></p>
<p class="code" style="margin:0; padding:12px; background-color:#f3f4f6; border:1px solid #d5d9de; border-radius:8px; font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace; font-size:30px; line-height:1.3; letter-spacing:6px; text-align:center; user-select:all; -webkit-user-select:all;">${code}</p>
</#if>
<p style="margin:16px 0 0;">${msg("registrationExpires", linkExpirationFormatter(linkExpiration))}</p>
<@layout.plain href>
<p style="margin:0;">${msg("registrationNotMe")} <a href="${page?replace("/account/verify", "/account/cancel") + query}">${msg("registrationCancel")}</a></p>
</@layout.plain>
</@layout.emailLayout>
</#macro>
