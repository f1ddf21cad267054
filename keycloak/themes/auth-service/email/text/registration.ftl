<#ftl output_format="plainText">
<#-- The text part of html/registration.ftl. Both parts are always needed: a text part of Keycloak's would carry Keycloak's link. -->
<#macro registration key="">
  <#local page = user.attributes.email_verify_url>
  <#local query = "?token=" + user.attributes.email_verify_token?url("UTF-8")>
  <#local code = (user.attributes.email_verify_code)!"">
${msg("registrationIntro", realmName)}<#if key?has_content> ${msg("registrationPassword")}</#if>

${page + query + key?has_content?then("&key=" + key?url("UTF-8"), "")}

<#if code?has_content>
${msg("registrationCode")} ${page}

    ${code}

</#if>
${msg("registrationExpires", linkExpirationFormatter(linkExpiration))}

-----

${msg("registrationNotMe")}
${msg("registrationCancel")}:

${page?replace("/account/verify", "/account/cancel") + query}
</#macro>
