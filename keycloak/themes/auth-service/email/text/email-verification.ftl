<#ftl output_format="plainText">
<#-- The text part of html/email-verification.ftl. Both parts are always needed: a text part of Keycloak's would carry Keycloak's link. -->
<#import "template.ftl" as layout>
<#if (user.attributes.email_verify_token)?has_content && (user.attributes.email_verify_url)?has_content>
<#assign kind = (((user.attributes.email_verify_kind)!"") == "invitation")?then("invitation", "registration")>
<#assign page = user.attributes.email_verify_url>
<#assign query = "?token=" + user.attributes.email_verify_token?url("UTF-8")>
<#assign code = (user.attributes.email_verify_code)!"">
${msg(kind + "Intro", realmName)}

${page + query}

<#if code?has_content>
${msg("codeIntro")} ${page}

    ${code}

</#if>
${msg("codeExpires", linkExpirationFormatter(linkExpiration))}

-----

${msg(kind + "NotMe")}
${msg(kind + "Cancel")}:

${page?replace("/account/verify", "/account/cancel") + query}
<@layout.legal />
<#else>
<@layout.mail msg("addressIntro", realmName) msg("addressNotMe") />
</#if>
