package stack

import (
	"strings"
	"testing"
)

func TestExpand(t *testing.T) {
	vars := map[string]string{"NAME": `a "quoted" \ name`, "EMPTY": ""}
	for _, c := range []struct{ in, want, err string }{
		{in: `"${NAME}"`, want: `"a \"quoted\" \\ name"`},
		{in: `"${NAME:unused}"`, want: `"a \"quoted\" \\ name"`},
		{in: `"${EMPTY:unused}"`, want: `""`},
		{in: `"${PORT:1025}"`, want: `"1025"`},
		{in: `"${URL:http://localhost:3000}/x"`, want: `"http://localhost:3000/x"`},
		{in: `"${client_account}"`, want: `"${client_account}"`},
		{in: `"${SECRET}" "${OTHER}"`, err: "${SECRET}"},
		{in: `"${SECRET}" "${OTHER}"`, err: "${OTHER}"},
	} {
		got, err := expand([]byte(c.in), vars)
		switch {
		case c.err == "" && (err != nil || string(got) != c.want):
			t.Errorf("expand(%s) = %s, %v; want %s", c.in, got, err, c.want)
		case c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)):
			t.Errorf("expand(%s) = %v; want an error that names %s", c.in, err, c.err)
		}
	}
}
