<#--
  What theme.properties has from the operator. What is no colour and no web address is not used: it would be code in CSS and in links.
-->
<#function webAddress value><#if value?matches(r"https?://[^\s<>()'\x22\\]+")><#return value></#if><#return ""></#function>
<#function colour value default><#if value?matches("#([0-9A-Fa-f]{3}){1,2}")><#return value></#if><#return default></#function>

<#assign accent = colour(properties.appColor!"", "#1b58b8")>
<#assign accentDark = colour(properties.appColorDark!"", "")>
<#assign logo = webAddress(properties.appLogoUrl!"")>

<#-- legal are the links that the law wants: of each a name, which a message has, and its address. -->
<#assign legal = []>
<#list ["privacy", "terms", "imprint"] as name>
<#if webAddress(properties[name + "Url"]!"")?has_content>
<#assign legal += [{"text": msg("legal" + name?cap_first), "url": properties[name + "Url"]}]>
</#if>
</#list>
