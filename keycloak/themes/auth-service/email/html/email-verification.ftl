<#--
  The mail of a registration or of an invitation (the user attribute email_verify_kind says which). Link and code are this service's, not Keycloak's: the user
  is disabled, and Keycloak's link would say so. A user without them has been asked by Keycloak itself.
-->
<#import "template.ftl" as layout>
<#if (user.attributes.email_verify_token)?has_content && (user.attributes.email_verify_url)?has_content>
<#assign kind = (((user.attributes.email_verify_kind)!"") == "invitation")?then("invitation", "registration")>
<#assign page = user.attributes.email_verify_url>
<#assign query = "?token=" + user.attributes.email_verify_token?url("UTF-8")>
<#assign code = (user.attributes.email_verify_code)!"">
<@layout.emailLayout>
<@layout.title msg(kind + "Title") />
<p style="margin:0;">${msg(kind + "Intro", realmName)}</p>
<@layout.button page + query msg(kind + "Button") />
<#if code?has_content>
<p style="margin:0 0 8px;">${msg("codeIntro")} <a href="${page}">${page}</a></p>
<p class="code" style="margin:0; padding:12px; background-color:#f3f4f6; border:1px solid #d5d9de; border-radius:8px; font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace; font-size:30px; line-height:1.3; letter-spacing:6px; text-align:center; user-select:all; -webkit-user-select:all;">${code}</p>
</#if>
<p style="margin:16px 0 0;">${msg("codeExpires", linkExpirationFormatter(linkExpiration))}</p>
<@layout.plain page + query>
<p style="margin:0;">${msg(kind + "NotMe")} <a href="${page?replace("/account/verify", "/account/cancel") + query}">${msg(kind + "Cancel")}</a></p>
</@layout.plain>
</@layout.emailLayout>
<#else>
<#-- Keycloak's own question, for example after somebody changed the address of an account. -->
<@layout.mail msg("registrationTitle") msg("addressIntro", realmName) msg("addressButton") msg("addressNotMe") />
</#if>
