// A frontend's way through the service, with the client that openapi-fetch makes of the
// document: register, verify, sign in, who am I, refresh, sign out. It takes the service's
// address, the mail address and the file that will have the mail's token.
import { readFileSync, existsSync } from "node:fs";
import createClient from "openapi-fetch";
import type { paths, components } from "./schema.d.ts";

const [base, email, mail] = process.argv.slice(2);
const client = createClient<paths>({ baseUrl: base });
const password = "correct horse battery staple";

/** Either the answer or, as an exception, the problem: its type is one of a closed set. */
function must<T>(step: string, r: { data?: T; error?: components["schemas"]["Problem"] }): T {
	if (r.error) throw new Error(`${step}: ${r.error.type satisfies components["schemas"]["ProblemType"]}`);
	return r.data as T;
}

const unfit = await client.POST("/api/v1/register", { body: { email, username: "a" } });
if (unfit.error?.type !== "/problems/invalid-request" || unfit.error.errors?.[0].field !== "username") {
	throw new Error("a username that is too short is accepted");
}
const registered = must("register", await client.POST("/api/v1/register", { body: { email, first_name: "Ada" } }));
console.log(registered.registration_id);
while (!existsSync(mail)) await new Promise((next) => setTimeout(next, 100));
must("verify", await client.POST("/api/v1/register/verify", { body: { token: readFileSync(mail, "utf8"), password } }));
const signedIn = must("login", await client.POST("/api/v1/auth/login", { body: { email, password } }));
const me = must("me", await client.GET("/api/v1/auth/me", {
	headers: { Authorization: `Bearer ${signedIn.access_token}` },
}));
if (me.role !== "user" || me.user_id !== signedIn.user.user_id) throw new Error("me is somebody else");
const refreshed = must("refresh", await client.POST("/api/v1/auth/refresh", {
	body: { refresh_token: signedIn.refresh_token! },
}));
must("logout", await client.POST("/api/v1/auth/logout", { body: { refresh_token: refreshed.refresh_token! } }));
