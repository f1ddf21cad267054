package preview

import (
	"context"
	"crypto/rand"
	"errors"
	"strconv"
	"strings"

	"auth-service/dev/stack"

	"github.com/Nerzal/gocloak/v13"
)

// A Mail is one of the mails that Keycloak sends on our behalf.
type Mail struct {
	Name   string // the local part of its receiver, before the language
	Kind   string // registration or invitation: with this service's link and code; "": with Keycloak's link
	Action string // what the person has to do; "": nothing, it is told that something was changed
}

// Mails are all that there are.
var Mails = []Mail{
	{"registration", "registration", "VERIFY_EMAIL"},
	{"invitation", "invitation", "VERIFY_EMAIL"},
	{"changed-address", "", "VERIFY_EMAIL"},
	{"password", "", "UPDATE_PASSWORD"},
	{"required-action", "", "CONFIGURE_TOTP"},
	{"notice", "", ""},
}

// SendMails makes Keycloak send every mail of a theme in some languages, to
// name.language@example.test at the SMTP server on smtpPort. The people live in a
// realm that is deleted again, so that the links lead nowhere.
func SendMails(ctx context.Context, s *stack.Stack, smtpPort int, theme string, languages []string) (err error) {
	realm := "test-" + strings.ToLower(rand.Text())
	vars := map[string]string{"SMTP_PORT": strconv.Itoa(smtpPort), "KEYCLOAK_BACKEND_CLIENT_SECRET": rand.Text()}
	if err := s.CreateRealm(ctx, realm, vars); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.DeleteRealm(context.WithoutCancel(ctx), realm)) }()
	token, err := s.AdminToken(ctx)
	if err != nil {
		return err
	}
	keycloak := gocloak.NewClient(s.KeycloakURL)
	if err := keycloak.UpdateRealm(ctx, token, gocloak.RealmRepresentation{Realm: &realm, EmailTheme: &theme}); err != nil {
		return err
	}
	for _, m := range Mails {
		for _, language := range languages {
			attributes := map[string][]string{"locale": {language}}
			if m.Kind != "" {
				attributes["email_verify_kind"] = []string{m.Kind}
				attributes["email_verify_url"] = []string{"http://localhost:3000/account/verify"}
				attributes["email_verify_token"] = []string{"p3G6d0Qm1yq0cZ2m8Rr5s7TtUuVvWwXx"}
				attributes["email_verify_code"] = []string{"042917"}
			}
			name := m.Name + "." + language
			actions := []string{}
			if m.Action != "" {
				actions = []string{m.Action}
			}
			id, err := keycloak.CreateUser(ctx, token, realm, gocloak.User{
				Username: &name, Email: gocloak.StringP(name + "@example.test"),
				FirstName: gocloak.StringP("Ada"), LastName: gocloak.StringP("Lovelace"),
				Enabled: gocloak.BoolP(true), Attributes: &attributes, RequiredActions: &actions})
			if err != nil {
				return err
			}
			if m.Action == "VERIFY_EMAIL" {
				err = keycloak.SendVerifyEmail(ctx, token, id, realm)
			} else {
				err = keycloak.ExecuteActionsEmail(ctx, token, realm, gocloak.ExecuteActionsEmail{UserID: &id, Actions: &actions})
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}
