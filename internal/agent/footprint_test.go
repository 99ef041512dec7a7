package agent

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestOnlyMappingsThatWereNeverWrittenAreLetGo(t *testing.T) {
	const clean, dirty, swapped = "Anonymous:             0 kB\nSwap:                  0 kB\n", "Anonymous:             4 kB\nSwap:                  0 kB\n",
		"Anonymous:             0 kB\nSwap:                  4 kB\n"
	smaps := "00400000-02646000 r-xp 00000000 fe:00 1312  /usr/bin/nodeagent\nSize:   35096 kB\n" + clean +
		"02646000-04c00000 r--p 02246000 fe:00 1312  /usr/bin/nodeagent\n" + clean +
		"04c00000-04ce0000 rw-p 04800000 fe:00 1312  /usr/bin/nodeagent\n" + clean +
		"04ce0000-04cf0000 r--p 04800000 fe:00 1312  /usr/bin/nodeagent\n" + dirty +
		"04cf0000-04d00000 r--p 04800000 fe:00 1312  /usr/bin/nodeagent\n" + swapped +
		"05000000-05001000 r--s 00000000 fe:00 1312  /usr/bin/nodeagent\n" + clean +
		"05001000-05002000 r--p 00000000 fe:00 1313  /usr/lib/other\n" + clean +
		"c000000000-c001400000 r--p 00000000 00:00 0\n" + clean +
		"7ffd1000-7ffd2000 r-xp 00000000 00:00 0  [vdso]\n" + clean
	got, err := cleanMappings(strings.NewReader(smaps), "/usr/bin/nodeagent")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([][2]uintptr{{0x400000, 0x2646000}, {0x2646000, 0x4c00000}}, got); diff != "" {
		t.Error(diff)
	}
}

func TestAddressesThatMakeNoSenseAreRefused(t *testing.T) {
	for _, addresses := range []string{"500000-400000", "x-y", "400000-400000", "-"} {
		if got, err := cleanMappings(strings.NewReader(addresses+" r-xp 0 fe:00 1 /a\n"), "/a"); err == nil {
			t.Errorf("%s: %v", addresses, got)
		}
	}
}

func TestAProgramGoesOnWithoutThePagesOfItsStart(t *testing.T) {
	for range 3 {
		released, err := releaseProgram()
		if err != nil || released == 0 {
			t.Fatalf("%d bytes, %v", released, err)
		}
	}
}
