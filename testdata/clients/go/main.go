// A client's way through the service, with the client that oapi-codegen makes of the document:
// register, verify, sign in, who am I, refresh, sign out. It takes the service's address, the mail
// address and the file that will have the mail's token.
package main

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"os"
	"time"

	"github.com/oapi-codegen/runtime/types"
)

func main() {
	base, email, mail := os.Args[1], types.Email(os.Args[2]), os.Args[3]
	password := "correct horse battery staple"
	ctx := context.Background()
	client, err := NewClientWithResponses(base)
	must("client", err, 0, 0)

	short := "a"
	refused, err := client.RegisterWithResponse(ctx, RegisterRequest{Email: email, Username: &short})
	must("register with a username that is too short", err, refused.StatusCode(), 400)
	if p := refused.ApplicationproblemJSON400; p.Type != ProblemsinvalidRequest || (*p.Errors)[0].Field != "username" {
		log.Fatalf("%+v", p)
	}
	registered, err := client.RegisterWithResponse(ctx, RegisterRequest{Email: email})
	must("register", err, registered.StatusCode(), 201)
	fmt.Println(registered.JSON201.RegistrationId)
	var token []byte
	for ; len(token) == 0; time.Sleep(100 * time.Millisecond) {
		token, _ = os.ReadFile(mail)
	}
	text := string(token)
	verified, err := client.VerifyWithResponse(ctx, VerifyRequest{Token: &text, Password: &password})
	must("verify", err, verified.StatusCode(), 200)
	address := string(email)
	tokens, err := client.LoginWithResponse(ctx, LoginRequest{Email: &address, Password: password})
	must("login", err, tokens.StatusCode(), 200)
	me, err := client.MeWithResponse(ctx, func(_ context.Context, r *http.Request) error {
		r.Header.Set("Authorization", "Bearer "+tokens.JSON200.AccessToken)
		return nil
	})
	must("me", err, me.StatusCode(), 200)
	if me.JSON200.UserId != tokens.JSON200.User.UserId {
		log.Fatal("me is somebody else")
	}
	refreshed, err := client.RefreshWithResponse(ctx, nil, RefreshRequest{RefreshToken: *tokens.JSON200.RefreshToken})
	must("refresh", err, refreshed.StatusCode(), 200)
	ended, err := client.LogoutWithResponse(ctx, nil, RefreshRequest{RefreshToken: *refreshed.JSON200.RefreshToken})
	must("logout", err, ended.StatusCode(), 204)
}

func must(step string, err error, got, want int) {
	if err != nil || got != want {
		log.Fatalf("%s: %d, want %d: %v", step, got, want, err)
	}
}
