<#--
  Asks for a one-time code. Keycloak's own page has a choice of devices that needs scripts and a pointer, and does not show
  which one is chosen.
-->
<#import "template.ftl" as layout>
<#import "field.ftl" as field>
<#import "buttons.ftl" as buttons>
<@layout.registrationLayout displayMessage=!messagesPerField.existsError("totp"); section>
<#if section = "header">
${msg("doLogIn")}
<#elseif section = "form">
<form id="kc-otp-login-form" action="${url.loginAction}" method="post">
<#if (otpLogin.userOtpCredentials?size > 1)>
<fieldset class="field">
<legend>${msg("loginTotpDeviceName")}</legend>
<#list otpLogin.userOtpCredentials as device>
<label class="check"><input type="radio" name="selectedCredentialId" value="${device.id}"<#if device.id == otpLogin.selectedCredentialId!""> checked</#if>> ${device.userLabel}</label>
</#list>
</fieldset>
</#if>
<@field.input name="otp" label=msg("loginOtpOneTime") autocomplete="one-time-code" fieldName="totp" autofocus=true />
<@buttons.loginButton />
</form>
</#if>
</@layout.registrationLayout>
