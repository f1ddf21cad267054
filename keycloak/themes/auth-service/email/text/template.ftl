<#ftl output_format="plainText">
<#import "../operator.ftl" as operator>

<#-- The links that the law wants. -->
<#macro legal>
<#if operator.legal?has_content>

-----

<#list operator.legal as l>
${l.text}: ${l.url}
</#list>
</#if>
</#macro>

<#-- The text part of a mail with Keycloak's own link: what for, the link, how long, and what to do if it was somebody else. -->
<#macro mail intro notMe>
${intro}
<#nested>

${link}

${msg("linkExpires", linkExpirationFormatter(linkExpiration))}

-----

${notMe}
<@legal />
</#macro>
