<#ftl output_format="plainText">
<#import "template.ftl" as layout>
<@layout.mail msg("passwordIntro", realmName) msg("passwordNotMe") />
