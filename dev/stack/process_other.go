//go:build unix && !linux

package stack

import (
	"os/exec"
	"syscall"
)

// dieWithUs puts cmd into its own process group. Only Linux has a death
// signal: elsewhere a SIGKILL of this process leaves its children behind.
func dieWithUs(cmd *exec.Cmd, _ syscall.Signal) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
}
