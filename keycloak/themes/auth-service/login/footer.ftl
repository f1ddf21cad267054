<#--
  The end of each page of Keycloak: the way to the service's registration, where people may register, the links that the law
  wants, labels that Keycloak's fields lack, and the operator's colours and logo. What is no colour and no web address is not used: it would be code in CSS and in links.
-->
<#function webAddress value><#if value?matches(r"https?://[^\s<>()'\x22\\]+")><#return value></#if><#return ""></#function>
<#function colour value><#if value?matches("#([0-9A-Fa-f]{3}){1,2}")><#return value></#if><#return ""></#function>

<#macro spoken field text><label for="${field}" class="spoken">${text}</label></#macro>

<#macro content>
<#if (auth.showUsername())!false><@spoken "kc-attempted-username" msg("usernameOrEmail")/></#if>
<#if pageId == "login-config-totp">
<@spoken "totp" msg("authenticatorCode")/>
<@spoken "userLabel" msg("loginTotpDeviceName")/>
</#if>
<#local service = webAddress(properties.authServiceUrl!"")?remove_ending("/")>
<#if service?has_content && properties.registration! != "invited" && ["login", "login-username"]?seq_contains(pageId)>
<p class="note">${msg("registerQuestion")} <a href="${service}/account/register">${msg("registerLink")}</a></p>
</#if>
<#local links><#list ["privacy", "terms", "imprint"] as name>
<#local url = webAddress(properties[name + "Url"]!"")>
<#if url?has_content><li><a href="${url}">${msg("legal" + name?cap_first)}</a></li></#if>
</#list></#local>
<#if links?markup_string?trim?has_content><ul class="legal">${links}</ul></#if>
<#local light = colour(properties.appColor!"") dark = colour(properties.appColorDark!"") logo = webAddress(properties.appLogoUrl!"")>
<#outputformat "undefined">
<style>
<#if light?has_content>
:root { --accent: ${light}; --accent-strong: color-mix(in srgb, ${light} 80%, black); --accent-soft: color-mix(in srgb, ${light} 12%, white); }
</#if>
<#if (light + dark)?has_content>
@media (prefers-color-scheme: dark) {
  :root { --accent: <#if dark?has_content>${dark}<#else>color-mix(in srgb, ${light} 45%, white)</#if>; }
  :root { --accent-strong: color-mix(in srgb, var(--accent) 70%, white); --accent-soft: color-mix(in srgb, var(--accent) 20%, black); }
}
</#if>
<#if logo?has_content>#kc-header-wrapper::before { mask: none; border-radius: 0; background: url("${logo}") center / contain no-repeat; }</#if>
</style>
</#outputformat>
</#macro>
