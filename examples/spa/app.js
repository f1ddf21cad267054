// A frontend without a build and without libraries. The access token is in this variable and nowhere else, the refresh
// token in a cookie that scripts can't read.
const service = document.querySelector("meta[name=auth-service]").content
const element = id => document.getElementById(id)
let accessToken = "", renewing

// send returns the JSON of the answer, or throws the problem (RFC 9457).
async function send(method, path, body) {
	const headers = accessToken ? {Authorization: "Bearer " + accessToken} : {}
	if (body) headers["Content-Type"] = "application/json"
	const sent = {method, headers, body: body && JSON.stringify(body), credentials: "include"}
	const answer = await fetch(service + path, sent)
	const content = await answer.json().catch(() => ({}))
	if (!answer.ok) throw {...content, status: answer.status, wait: answer.headers.get("Retry-After")}
	return content
}

// renew exchanges the cookie for an access token, once for all who wait. 401: no cookie, or its session is over.
function renew() {
	renewing ??= send("POST", "/api/v1/auth/refresh").catch(problem => {
		if (problem.status === 401) return {access_token: ""}
		throw problem
	}).then(tokens => { accessToken = tokens.access_token }).finally(() => { renewing = undefined })
	return renewing
}

// ask sends a request of somebody who is signed in. A token that has expired or was revoked is renewed, once.
async function ask(method, path, body) {
	try {
		return await send(method, path, body)
	} catch (problem) {
		if (problem.status !== 401) throw problem
		await renew()
		return send(method, path, body)
	}
}

// explain switches on the type, which stays the same; title and detail may be worded anew.
function explain(problem) {
	switch (problem.type) {
	case undefined: return "The network is away. Please try again."
	case "/problems/unauthorized": return "Your session has ended. Please sign in again."
	case "/problems/user-exists": return "You have an account already. Please sign in."
	case "/problems/too-many-requests":
	case "/problems/unavailable": return `Nothing is lost. Please try again in ${problem.wait} seconds, or wait here.`
	default: return problem.errors?.map(e => e.field + " " + e.detail).join(", ") ?? problem.detail
	}
}

// attempt does something, then shows who is signed in, and what went wrong. What only has to wait is done again.
async function attempt(something) {
	element("message").textContent = ""
	element("message").textContent = await something().catch(problem => {
		if (problem.wait) setTimeout(attempt, problem.wait * 1000, something)
		return explain(problem)
	}) ?? ""
	element("signed-in").hidden = !accessToken
	element("signed-out").hidden = !!accessToken
}

async function showMe() {
	const me = await ask("GET", "/api/v1/auth/me")
	element("email").textContent = me.email
	element("role").textContent = me.role
}

const here = encodeURIComponent(location.origin + location.pathname)
document.querySelector("a").href = service + "/auth/login?return_to=" + here
document.querySelector("form").onsubmit = event => {
	event.preventDefault()
	attempt(async () => {
		await send("POST", "/api/v1/register", {email: event.target.email.value})
		return "Look into your mailbox: the link in our mail leads to your password. Then sign in."
	})
}
element("ask").onclick = () => attempt(showMe)
element("sign-out").onclick = () => attempt(async () => {
	await send("POST", "/api/v1/auth/logout")
	accessToken = ""
})
attempt(async () => {
	await renew()
	if (accessToken) await showMe()
})
