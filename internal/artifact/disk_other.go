//go:build !linux

package artifact

import (
	"errors"
	"os"
)

// Nodes run Linux; elsewhere this package only needs to compile and be right.

func reserve(*os.File, int64) error { return nil }

func startWriteback(*os.File, int64, int64) {}

func willNeed(*os.File, int64) {}

func freeBytes(string) (int64, error) { return 0, errors.ErrUnsupported }

func deviceOf(string) (uint64, bool) { return 0, false }

func allocated(string) int64 { return 0 }
