// Package mail catches the mails of a development stack or a test: an SMTP
// server that delivers nothing, and an inbox for the browser.
package mail

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/emersion/go-message/mail"
	"github.com/emersion/go-smtp"

	_ "github.com/emersion/go-message/charset" // mails in something else than UTF-8
)

// maxMessages are kept; the oldest goes first.
const maxMessages = 1000

// A Message is one mail as it was handed over; its JSON is what /api/messages shows.
type Message struct {
	ID      int         `json:"id"` // counts from 1
	At      time.Time   `json:"at"`
	From    string      `json:"from"` // of the envelope
	To      []string    `json:"to"`   // of the envelope
	Subject string      `json:"subject"`
	Links   []string    `json:"links"` // of the text part, in order
	Text    string      `json:"text"`
	HTML    string      `json:"html"` // the part a mail reader shows; empty if there is none
	Header  mail.Header `json:"-"`
	Raw     []byte      `json:"-"`
}

// A Catcher receives mail.
type Catcher struct {
	addr   string
	dir    string // where mails are kept over a restart; empty for nowhere
	server *smtp.Server

	mu       sync.Mutex
	refused  []string // addresses
	last     int      // ID of the newest message
	messages []Message
	arrived  chan struct{} // closed and replaced at each arrival
}

// Start receives mail at addr; port 0 chooses a free one.
func Start(addr string) (*Catcher, error) { return StartIn(addr, "") }

// StartIn is Start with the mails of dir, where those to come are kept too.
func StartIn(addr, dir string) (*Catcher, error) {
	c := &Catcher{addr: addr, dir: dir, arrived: make(chan struct{})}
	if dir != "" {
		if err := c.load(); err != nil {
			return nil, fmt.Errorf("reading the mails in %s: %w", dir, err)
		}
	}
	return c, c.Restart()
}

// Restart receives mail again after Close, at the same address; the messages
// are still there.
func (c *Catcher) Restart() error {
	l, err := net.Listen("tcp", c.addr)
	if err != nil {
		return err
	}
	c.addr = l.Addr().String()
	c.server = smtp.NewServer(smtp.BackendFunc(func(*smtp.Conn) (smtp.Session, error) { return &session{catcher: c}, nil }))
	c.server.Domain = "localhost"
	c.server.MaxMessageBytes = 10 << 20
	c.server.ReadTimeout, c.server.WriteTimeout = time.Minute, time.Minute
	c.server.EnableSMTPUTF8 = true
	c.server.ErrorLog = log.New(io.Discard, "", 0) // clients that hang up are no news
	go c.server.Serve(l)
	return nil
}

// Close ends the server and its connections: the next mail is refused.
func (c *Catcher) Close() error { return c.server.Close() }

// Addr is where mail is received, host and port.
func (c *Catcher) Addr() string { return c.addr }

// Messages are all that are kept, oldest first.
func (c *Catcher) Messages() []Message {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]Message{}, c.messages...)
}

// To are the messages to one address, oldest first.
func (c *Catcher) To(address string) []Message {
	return slices.DeleteFunc(c.Messages(), func(m Message) bool {
		return !slices.ContainsFunc(m.To, func(to string) bool { return strings.EqualFold(to, address) })
	})
}

// WaitFor returns the n-th message to an address, the first being 1, as soon
// as it is there.
func (c *Catcher) WaitFor(ctx context.Context, to string, n int) (Message, error) {
	for {
		c.mu.Lock()
		arrived := c.arrived
		c.mu.Unlock()
		found := c.To(to)
		if len(found) >= n {
			return found[n-1], nil
		}
		select {
		case <-arrived:
		case <-ctx.Done():
			return Message{}, fmt.Errorf("%d mails to %s arrived, not %d: %w", len(found), to, n, context.Cause(ctx))
		}
	}
}

// Refuse makes the server answer that it has no such mailbox, until Accept.
func (c *Catcher) Refuse(address string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refused = append(c.refused, address)
}

// Accept ends Refuse.
func (c *Catcher) Accept(address string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refused = slices.DeleteFunc(c.refused, func(a string) bool { return strings.EqualFold(a, address) })
}

// refuses says whether mail to an address is refused.
func (c *Catcher) refuses(address string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.ContainsFunc(c.refused, func(a string) bool { return strings.EqualFold(a, address) })
}

// add keeps a message and wakes those who wait.
func (c *Catcher) add(m Message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last++
	m.ID = c.last
	c.messages = append(c.messages, m)
	if c.dir != "" {
		os.WriteFile(c.file(m.ID), m.Raw, 0o600)
		os.Remove(c.file(m.ID - maxMessages))
	}
	if len(c.messages) > maxMessages {
		c.messages = slices.Delete(c.messages, 0, 1)
	}
	close(c.arrived)
	c.arrived = make(chan struct{})
}

func (c *Catcher) file(id int) string { return filepath.Join(c.dir, fmt.Sprintf("%08d.eml", id)) }

// load reads the mails of an earlier run. Their envelopes are lost, but the
// header of what a service sends says the same.
func (c *Catcher) load() error {
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return err
	}
	paths, err := filepath.Glob(filepath.Join(c.dir, "*.eml"))
	for _, path := range paths {
		raw, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		m := Message{Raw: raw, At: info.ModTime()}
		if m.parse() != nil {
			continue // cut off when the machine went down
		}
		fmt.Sscanf(filepath.Base(path), "%d.eml", &m.ID)
		from, _ := m.Header.AddressList("From")
		to, _ := m.Header.AddressList("To")
		for _, a := range from {
			m.From = a.Address
		}
		for _, a := range to {
			m.To = append(m.To, a.Address)
		}
		c.messages, c.last = append(c.messages, m), m.ID
	}
	return err
}

// link is a URL in a mail's text, without the punctuation that may follow.
var link = regexp.MustCompile(`https?://[^\s<>"]*[^\s<>".,;:)]`)

// parse fills the fields that are read from Raw.
func (m *Message) parse() error {
	r, err := mail.CreateReader(bytes.NewReader(m.Raw))
	if err != nil {
		return err
	}
	m.Header = r.Header
	m.Subject, _ = r.Header.Subject()
	for {
		part, err := r.NextPart()
		if errors.Is(err, io.EOF) {
			m.Links = link.FindAllString(m.Text, -1)
			return nil
		}
		if err != nil {
			return err
		}
		body, err := io.ReadAll(part.Body)
		if err != nil {
			return err
		}
		if h, ok := part.Header.(*mail.InlineHeader); ok { // not an attachment
			switch kind, _, _ := h.ContentType(); kind {
			case "text/html":
				m.HTML = string(body)
			case "text/plain":
				m.Text = string(body)
			}
		}
	}
}

// session is one SMTP connection; it takes whatever it is given, unless that is refused.
type session struct {
	catcher *Catcher
	from    string
	to      []string
}

func (s *session) Reset()        { s.from, s.to = "", nil }
func (s *session) Logout() error { return nil }

func (s *session) Mail(from string, _ *smtp.MailOptions) error {
	s.from = from
	return nil
}

func (s *session) Rcpt(to string, _ *smtp.RcptOptions) error {
	if s.catcher.refuses(to) {
		return &smtp.SMTPError{Code: 550, EnhancedCode: smtp.EnhancedCode{5, 1, 1}, Message: "no such mailbox"}
	}
	s.to = append(s.to, to)
	return nil
}

func (s *session) Data(r io.Reader) error {
	raw, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	m := Message{At: time.Now(), From: s.from, To: s.to, Raw: raw}
	if err := m.parse(); err != nil {
		return &smtp.SMTPError{Code: 554, Message: "this mail can't be parsed: " + err.Error()}
	}
	s.catcher.add(m)
	return nil
}
