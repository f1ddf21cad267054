package stack

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os/exec"
	"regexp"
	"sync"
)

// CheckPort returns an error that says who has the port and which flag chooses
// another, if it can't be listened on.
func CheckPort(port int, what, flag string) error {
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err == nil {
		return l.Close()
	}
	// ss names only processes that we may see; without it the port alone must do.
	owner := ""
	out, _ := exec.Command("ss", "-Hltnp", fmt.Sprintf("sport = :%d", port)).Output()
	if m := regexp.MustCompile(`"(.+?)",pid=(\d+)`).FindSubmatch(out); m != nil {
		owner = fmt.Sprintf(" by %s (process %s)", m[1], m[2])
	}
	return fmt.Errorf("port %d, wanted for %s, is taken%s; stop what uses it, or choose another port with %s", port, what, owner, flag)
}

// choosePort checks that a port is free, or chooses one if it is 0.
func choosePort(port int, what, flag string) (int, error) {
	if port == 0 {
		return FreePort(), nil
	}
	return port, CheckPort(port, what, flag)
}

var (
	givenMu sync.Mutex
	given   = map[int]bool{} // what FreePort has returned
)

// FreePort returns a port that nothing listens on. It is below the range from
// which the kernel takes ports for outgoing connections, so that a server that
// a test stops finds its port free when it is started again.
func FreePort() int {
	givenMu.Lock()
	defer givenMu.Unlock()
	for {
		port := 20000 + rand.IntN(10000)
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil && !given[port] {
			given[port] = true
			l.Close()
			return port
		}
	}
}
