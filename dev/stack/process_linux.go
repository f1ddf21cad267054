package stack

import (
	"os/exec"
	"syscall"
)

// dieWithUs puts cmd into its own process group and asks the kernel to signal
// it when the thread that starts it ends.
func dieWithUs(cmd *exec.Cmd, sig syscall.Signal) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	cmd.SysProcAttr.Pdeathsig = sig
}
