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
<#assign expires = msg("codeExpires", linkExpirationFormatter(linkExpiration))>
<@layout.emailLayout msg(kind + "Button") + ". " + expires>
<@layout.title msg(kind + "Title") />
<p style="margin:0;">${msg(kind + "Intro", realmName)}</p>
<@layout.button page + query msg(kind + "Button") />
<#if code?has_content>
<p style="margin:0 0 8px;">${msg("codeIntro")} <a href="${page}" dir="ltr">${page}</a></p>
<p class="code" dir="ltr" style="margin:0; padding:12px; background-color:#eef1f6; border:1px solid #d5dbe5; border-radius:10px; font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace; font-size:30px; line-height:1.3; letter-spacing:6px; text-align:center; user-select:all; -webkit-user-select:all;">${code}</p>
</#if>
<p style="margin:16px 0 0;">${expires}</p>
<@layout.plain page + query>
<p style="margin:0;">${msg(kind + "NotMe")} <a href="${page?replace("/account/verify", "/account/cancel") + query}">${msg(kind + "Cancel")}</a></p>
</@layout.plain>
</@layout.emailLayout>
<#else>
<#-- Keycloak's own question, for example after somebody changed the address of an account. -->
<@layout.mail msg("registrationTitle") msg("addressIntro", realmName) msg("addressButton") msg("addressNotMe") />
</#if>
