<#import "template.ftl" as layout>
<@layout.mail msg("passwordTitle") msg("passwordIntro", realmName) msg("passwordButton") msg("passwordNotMe") />
