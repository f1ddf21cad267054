<#ftl output_format="plainText">
<#-- The text part of a mail with Keycloak's own link: what for, the link, how long, and what to do if it was somebody else. -->
<#macro mail intro notMe>
${intro}
<#nested>

${link}

${msg("linkExpires", linkExpirationFormatter(linkExpiration))}

-----

${notMe}
</#macro>
