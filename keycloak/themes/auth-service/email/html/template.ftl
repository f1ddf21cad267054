<#--
  The frame of every HTML mail, also of those that come from Keycloak's base theme. It needs no image and no table but the button's, and follows the
  reader's light or dark mode. Names and addresses of people are never printed: whoever registers could put a link into somebody else's mail with them.
-->
<#macro emailLayout>
<!doctype html>
<html lang="${locale.language}" dir="${(ltr!true)?then('ltr','rtl')}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="supported-color-schemes" content="light dark">
<meta name="format-detection" content="telephone=no, date=no, address=no, email=no">
<title>${realmName}</title>
<style>
:root { color-scheme: light dark; }
a { color: #0b57b0; }
@media (prefers-color-scheme: dark) {
  .page { background-color: #14171b !important; color: #e8eaed !important; }
  .card { background-color: #1f2429 !important; border-color: #3a4149 !important; }
  .quiet { color: #b3bac2 !important; border-color: #3a4149 !important; }
  .code { background-color: #14171b !important; border-color: #3a4149 !important; }
  a { color: #8ab8ff; }
}
</style>
</head>
<body class="page" style="margin:0; padding:24px 12px; background-color:#f3f4f6; color:#1f2328; font-family:system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif; font-size:16px; line-height:1.5; overflow-wrap:anywhere;">
<div class="card" style="max-width:520px; margin:0 auto; padding:28px 24px; background-color:#ffffff; border:1px solid #d5d9de; border-radius:12px;">
<p class="quiet" style="margin:0 0 20px; color:#57606a; font-size:14px; font-weight:600;">${realmName}</p>
<#nested>
</div>
</body>
</html>
</#macro>

<#macro title text>
<h1 style="margin:0 0 12px; font-size:22px; line-height:1.3;">${text}</h1>
</#macro>

<#-- The one thing to press. Its address stands again, as text, at the end of the mail: `plain` below. -->
<#macro button href text>
<table role="presentation" cellpadding="0" cellspacing="0" border="0" style="margin:24px 0;"><tr><td bgcolor="#0b57b0" style="border-radius:8px;">
<a href="${href}" style="display:inline-block; padding:13px 24px; border:1px solid #0b57b0; border-radius:8px; color:#ffffff; font-weight:600; text-align:center; text-decoration:none;">${text}</a>
</td></tr></table>
</#macro>

<#-- The small print: what to do if it was somebody else, and the button's address for mail clients that show no buttons. -->
<#macro plain href>
<div class="quiet" style="margin-top:24px; padding-top:16px; border-top:1px solid #d5d9de; color:#57606a; font-size:14px;">
<#nested>
<p style="margin:16px 0 0;">${msg("linkAsText")}<br><a href="${href}" style="font-size:12px; line-height:1.4; word-break:break-all;">${href}</a></p>
</div>
</#macro>

<#-- A whole mail with Keycloak's own link. -->
<#macro mail heading intro buttonText notMe>
<@emailLayout>
<@title heading />
<p style="margin:0;">${intro}</p>
<#nested>
<@button link buttonText />
<p style="margin:0;">${msg("linkExpires", linkExpirationFormatter(linkExpiration))}</p>
<@plain link><p style="margin:0;">${notMe}</p></@plain>
</@emailLayout>
</#macro>
