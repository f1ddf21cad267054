package main

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"regexp"
	"sync"
)

// fault is what happens to a call on its way to Keycloak.
type fault int

const (
	lost    fault = iota + 1 // it never arrives
	applied                  // it arrives, and the answer is lost
)

// gate is a reverse proxy in front of the real Keycloak. Closed, it refuses
// connections like a server that is stopped.
type gate struct {
	mu     sync.Mutex
	addr   string
	server *http.Server
	proxy  *httputil.ReverseProxy

	faults  map[string]fault // by a pattern of "PUT /admin/realms/…"
	calls   []string
	blocked chan struct{} // calls wait here; nil: they don't
}

func newGate(target string) (*gate, error) {
	u, err := url.Parse(target)
	if err != nil {
		return nil, err
	}
	g := &gate{addr: "127.0.0.1:0", faults: map[string]fault{}}
	g.proxy = &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(u)
			r.Out.Host = r.In.Host // Keycloak's issuer is the address that it was called at
		},
		ModifyResponse: func(resp *http.Response) error {
			if g.fault(resp.Request) == applied {
				return errors.New("the answer is lost")
			}
			return nil
		},
		ErrorHandler: func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
	}
	return g, g.open()
}

func (g *gate) url() string { return "http://" + g.addr }

func (g *gate) open() error {
	l, err := net.Listen("tcp", g.addr)
	if err != nil {
		return err
	}
	g.addr = l.Addr().String()
	g.server = &http.Server{Handler: g}
	go g.server.Serve(l)
	return nil
}

func (g *gate) close() error { return g.server.Close() }

// on makes a fault of all calls that match, until it is 0 again.
func (g *gate) on(pattern string, f fault) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.faults[pattern] = f
}

func (g *gate) fault(r *http.Request) fault {
	g.mu.Lock()
	defer g.mu.Unlock()
	for pattern, f := range g.faults {
		if regexp.MustCompile(pattern).MatchString(r.Method + " " + r.URL.Path) {
			return f
		}
	}
	return 0
}

// block makes all calls wait, until the returned function is called: a server
// that hangs.
func (g *gate) block() (release func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	blocked := make(chan struct{})
	g.blocked = blocked
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.blocked = nil
		close(blocked)
	}
}

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	g.calls = append(g.calls, r.Method+" "+r.URL.Path)
	blocked := g.blocked
	g.mu.Unlock()
	if blocked != nil {
		select {
		case <-blocked:
		case <-r.Context().Done():
		}
	}
	if g.fault(r) == lost {
		panic(http.ErrAbortHandler)
	}
	g.proxy.ServeHTTP(w, r)
}

// pipe is a TCP proxy in front of PostgreSQL.
type pipe struct {
	addr, target string
	mu           sync.Mutex
	listener     net.Listener
	conns        []net.Conn
}

func newPipe(target string) (*pipe, error) {
	p := &pipe{addr: "127.0.0.1:0", target: target}
	return p, p.open()
}

func (p *pipe) open() error {
	l, err := net.Listen("tcp", p.addr)
	if err != nil {
		return err
	}
	p.addr, p.listener = l.Addr().String(), l
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go p.carry(conn)
		}
	}()
	return nil
}

func (p *pipe) carry(conn net.Conn) {
	server, err := net.Dial("tcp", p.target)
	if err != nil {
		conn.Close()
		return
	}
	p.mu.Lock()
	p.conns = append(p.conns, conn, server)
	p.mu.Unlock()
	go func() { io.Copy(server, conn); server.Close() }()
	io.Copy(conn, server)
	conn.Close()
}

// close refuses connections and cuts those that there are.
func (p *pipe) close() error {
	err := p.listener.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, conn := range p.conns {
		conn.Close()
	}
	p.conns = nil
	return err
}
