package main

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"math/big"
	"regexp"

	gonanoid "github.com/matoous/go-nanoid/v2"
)

// Identifiers are a prefix and 16 nanoid characters (96 bits), so that one type
// of id is never mistaken for another, in a URL as little as in the code.
type (
	registrationID string // REG-…; a capability: whoever has it may ask for the status
	userID         string // USR-…
	sessionID      string // SES-…
	auditID        string // AUD-…
	syncID         string // SYN-…
)

func newRegistrationID() registrationID { return registrationID("REG-" + gonanoid.Must(16)) }
func newUserID() userID                 { return userID("USR-" + gonanoid.Must(16)) }
func newSessionID() sessionID           { return sessionID("SES-" + gonanoid.Must(16)) }
func newAuditID() auditID               { return auditID("AUD-" + gonanoid.Must(16)) }

func newSyncID() syncID { return syncID("SYN-" + gonanoid.Must(16)) }

var (
	userIDPattern         = regexp.MustCompile(`^USR-[A-Za-z0-9_-]{16}$`)
	registrationIDPattern = regexp.MustCompile(`^REG-[A-Za-z0-9_-]{16}$`)
)

// newToken returns the secret of a verification link: 32 nanoid characters, 192 bits.
func newToken() string { return gonanoid.Must(32) }

// digest is SHA-256 in hex. It is what PostgreSQL keeps of a token: that is random and long, so
// a plain hash can't be guessed back.
func digest(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:])
}

// newCode returns the six digits that stand in the mail beside the link.
func newCode() string {
	n, err := rand.Int(rand.Reader, big.NewInt(1_000_000))
	if err != nil {
		panic(err) // crypto/rand never fails on a working system
	}
	return fmt.Sprintf("%06d", n)
}

// codeHash is what PostgreSQL keeps of a code. Six digits are guessed in no time
// from a plain hash, so it is keyed: by the link's token, which only Keycloak
// has. A copy of the database therefore opens no registration.
func codeHash(key, code string) string {
	mac := hmac.New(sha256.New, []byte(key))
	mac.Write([]byte(code))
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil))[:10]
}

// seal encrypts an answer with a key that is made of the refresh token which asked for
// it. The token is not stored, so a copy of the database opens nothing.
func seal(token string, answer []byte) []byte {
	return sealer(token).Seal(nil, nil, answer, nil) // #nosec G407 -- each key seals once
}

func openSealed(token string, sealed []byte) ([]byte, error) {
	return sealer(token).Open(nil, nil, sealed, nil)
}

// sealer is AES-256-GCM with a random nonce, under a key by HKDF (RFC 5869). It fails
// for no token.
func sealer(token string) cipher.AEAD {
	key, err := hkdf.Key(sha256.New, []byte(token), nil, "auth-service: answer to a refresh token", 32)
	if err != nil {
		panic(err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		panic(err)
	}
	return aead
}

// sameSecret compares in constant time.
func sameSecret(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }
