<#--
  The frame of every HTML mail, also of those that come from Keycloak's base theme. Tables hold it together, because Outlook knows nothing
  else; it needs no image, and follows the reader's light or dark mode. Names and addresses of people are never printed: whoever registers
  could put a link into somebody else's mail with them.
-->
<#import "../operator.ftl" as operator>
<#assign dir = (ltr!true)?then("ltr", "rtl") start = (ltr!true)?then("left", "right")>

<#-- preheader is what a list of mails shows beside the subject: what to do, and until when. -->
<#macro emailLayout preheader="">
<!doctype html>
<html lang="${locale.language}" dir="${dir}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="supported-color-schemes" content="light dark">
<meta name="format-detection" content="telephone=no, date=no, address=no, email=no">
<title>${realmName}</title>
<style>
:root { color-scheme: light dark; }
a { color: ${operator.accent}; }
@media (prefers-color-scheme: dark) {
  .page { background-color: #0f141b !important; color: #e8ecf2 !important; }
  .card { background-color: #19202a !important; border-color: #313b49 !important; }
  .text { color: #e8ecf2 !important; }
  .quiet { color: #a9b4c3 !important; border-color: #313b49 !important; }
  .code { background-color: #0f141b !important; border-color: #313b49 !important; }
<#if operator.accentDark?has_content>
  a { color: ${operator.accentDark}; }
<#else>
  a { color: #8fbaff; color: color-mix(in srgb, ${operator.accent} 45%, white); }
</#if>
}
</style>
<!--[if mso]><style>td, p, h1, a { font-family: Arial, sans-serif !important; }</style><![endif]-->
</head>
<body class="page" dir="${dir}" style="margin:0; padding:0; background-color:#eef1f6;">
<#if preheader?has_content>
<div style="display:none; max-height:0; overflow:hidden; mso-hide:all;">${preheader}<#list 1..60 as _>&#847;&zwnj;&nbsp;</#list></div>
</#if>
<table class="page" role="presentation" width="100%" cellpadding="0" cellspacing="0" border="0" bgcolor="#eef1f6" dir="${dir}" style="background-color:#eef1f6;"><tr><td align="center" style="padding:24px 12px;">
<!--[if mso]><table role="presentation" width="520" cellpadding="0" cellspacing="0" border="0"><tr><td><![endif]-->
<table class="card" role="presentation" width="100%" cellpadding="0" cellspacing="0" border="0" bgcolor="#ffffff" style="max-width:520px; table-layout:fixed; border-collapse:separate; background-color:#ffffff; border:1px solid #d5dbe5; border-radius:16px;"><tr>
<td class="text" align="${start}" style="padding:28px 24px; color:#18212e; font-family:system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif; font-size:16px; line-height:1.5; overflow-wrap:anywhere;">
<p class="quiet" style="margin:0 0 20px; color:#505c6d; font-size:14px; font-weight:600;"><#if operator.logo?has_content><img src="${operator.logo}" alt="" height="28" style="height:28px; border:0; vertical-align:middle;">&nbsp;&nbsp;</#if>${realmName}</p>
<#nested>
</td></tr></table>
<#if operator.legal?has_content>
<table role="presentation" width="100%" cellpadding="0" cellspacing="0" border="0" style="max-width:520px;"><tr>
<td align="${start}" style="padding:12px 24px 0; font-family:system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif; font-size:14px; line-height:1.5;"><#list operator.legal as l><a class="quiet" href="${l.url}" style="color:#505c6d;">${l.text}</a><#sep> &nbsp; </#sep></#list></td>
</tr></table>
</#if>
<!--[if mso]></td></tr></table><![endif]-->
</td></tr></table>
</body>
</html>
</#macro>

<#macro title text>
<h1 style="margin:0 0 12px; font-size:22px; line-height:1.3;">${text}</h1>
</#macro>

<#-- The one thing to press. Its address stands again, as text, at the end of the mail: `plain` below. -->
<#macro button href text>
<table role="presentation" cellpadding="0" cellspacing="0" border="0" style="margin:24px 0;"><tr><td bgcolor="${operator.accent}" style="border-radius:10px; mso-padding-alt:13px 24px;">
<a href="${href}" style="display:inline-block; padding:13px 24px; mso-padding-alt:0; border:1px solid ${operator.accent}; border-radius:10px; background-color:${operator.accent}; color:#ffffff; font-weight:600; text-align:center; text-decoration:none;">${text}</a>
</td></tr></table>
</#macro>

<#-- The small print: what to do if it was somebody else, and the button's address for mail clients that show no buttons. -->
<#macro plain href>
<div class="quiet" style="margin-top:24px; padding-top:16px; border-top:1px solid #d5dbe5; color:#505c6d; font-size:14px;">
<#nested>
<p style="margin:16px 0 0;">${msg("linkAsText")}<br><a href="${href}" dir="ltr" style="font-size:12px; line-height:1.4; word-break:break-all;">${href}</a></p>
</div>
</#macro>

<#-- A whole mail with Keycloak's own link. -->
<#macro mail heading intro buttonText notMe>
<#local expires = msg("linkExpires", linkExpirationFormatter(linkExpiration))>
<@emailLayout buttonText + ". " + expires>
<@title heading />
<p style="margin:0;">${intro}</p>
<#nested>
<@button link buttonText />
<p style="margin:0;">${expires}</p>
<@plain link><p style="margin:0;">${notMe}</p></@plain>
</@emailLayout>
</#macro>
