package publish

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/hearth-sh/hearth/internal/precompile"
	"github.com/hearth-sh/hearth/internal/submit"
)

// Checker has modules checked by precompile's children for the submit API.
type Checker struct{ compiler *precompile.Compiler }

var _ submit.Checker = Checker{}

// NewChecker returns a checker that uses the compiler's children.
func NewChecker(compiler *precompile.Compiler) Checker { return Checker{compiler} }

// Check implements submit.Checker.
func (c Checker) Check(ctx context.Context, path string, memoryMiB int) (submit.CheckReport, error) {
	module, err := os.Open(path)
	if err != nil {
		return submit.CheckReport{}, fmt.Errorf("open the received module: %w", err)
	}
	defer module.Close()
	report, err := c.compiler.Check(ctx, module, precompile.CheckOptions{MemoryLimitMiB: memoryMiB})
	if err != nil {
		var known *precompile.Error
		if errors.As(err, &known) {
			return submit.CheckReport{}, &submit.CheckError{Code: known.Code, Detail: known.Detail, Retryable: known.Retryable}
		}
		return submit.CheckReport{}, err
	}
	return submit.CheckReport{Kind: report.Kind, Digest: report.ModuleDigest, MemoryMinPages: uint32(min(report.MemoryMinPages, 1<<16))}, nil
}
