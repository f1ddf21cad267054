<#ftl output_format="plainText">
<#import "template.ftl" as layout>
<#assign actions = requiredActions![]>
<#if actions?seq_contains("UPDATE_PASSWORD")>
<@layout.mail msg("passwordIntro", realmName) msg("passwordNotMe") />
<#elseif actions?size == 0>
${msg("noticeIntro", realmName)}

${msg("noticeNotMe")}
<@layout.legal />
<#else>
<@layout.mail msg("actionsIntro", realmName) msg("actionsNotMe")>

<#list actions as action>
- ${msg("requiredAction." + action)?remove_beginning("requiredAction.")}
</#list>
</@layout.mail>
</#if>
