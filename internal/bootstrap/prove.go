package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
	"github.com/hearth-sh/hearth/internal/shim"
)

// What can keep WebAssembly from running.
const (
	CodeRuntimeMissing  fault.Code = "runtime-missing"
	CodeRuntimeUnproven fault.Code = "runtime-unproven"
	CodeContainerd      fault.Code = "containerd-unreachable"
)

// prover runs the probe through runtimes of this node; proveWasm is the real one.
type prover func(ctx context.Context, handlers []string, log *slog.Logger) (map[string]shim.Proof, error)

// proveWasm finds the node's Wasm runtimes as containerd has them and runs the
// probe through each of the handlers. A handler that containerd does not have
// is missing in the answer.
func proveWasm(socket string) prover {
	return func(ctx context.Context, handlers []string, log *slog.Logger) (map[string]shim.Proof, error) {
		node, err := shim.NewContainerd(shim.ContainerdOptions{Address: socket, Logger: log})
		if err != nil {
			return nil, err
		}
		defer node.Close()
		server, err := node.Server(ctx)
		if err != nil {
			return nil, fault.Passing(CodeContainerd, err, "see k3s's containerd.log", "containerd does not answer at %s", socket)
		}
		connection, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return nil, fmt.Errorf("connect to %s: %w", socket, err)
		}
		defer connection.Close()
		inventory, err := shim.Discover(ctx, shim.DiscoverOptions{
			ContainerdPID: server.PID, CRI: runtimeapi.NewRuntimeServiceClient(connection),
		})
		if err != nil {
			log.Warn("some runtimes may not have been found", "err", err)
		}
		proofs := map[string]shim.Proof{}
		proving := shim.NewProver(node, shim.ProverOptions{Logger: log})
		for _, r := range inventory.Runtimes {
			for _, h := range handlers {
				if r.Handler == h {
					proofs[h] = proving.Prove(ctx, r)
				}
			}
		}
		return proofs, nil
	}
}

// prove holds every configured runtime to what it promises, and returns those
// that ran the probe.
func prove(ctx context.Context, shims []v1alpha1.ShimConfig, try prover, log *slog.Logger, note, warn func(string, ...any)) ([]string, error) {
	if len(shims) == 0 {
		return nil, nil
	}
	handlers := make([]string, 0, len(shims))
	for _, s := range shims {
		handlers = append(handlers, s.Name)
	}
	proofs, err := try(ctx, handlers, log)
	if err != nil {
		return nil, err
	}
	var proven []string
	var failed []error
	for _, s := range shims {
		proof, found := proofs[s.Name]
		var f *fault.Error
		switch {
		case found && proof.OK:
			proven = append(proven, s.Name)
			note("%s ran a WebAssembly module in %s", s.Name, proof.Took.Round(1e6))
			continue
		case !found:
			f = fault.New(CodeRuntimeMissing, nil,
				"k3s looks for shims when it starts: see whether the binary is in /usr/local/bin and restart k3s", "containerd has no runtime handler %s", s.Name)
		default:
			f = fault.New(CodeRuntimeUnproven, nil, "see docs/operations.md on "+string(proof.Code),
				"%s did not run a WebAssembly module: %s", s.Name, strings.TrimSuffix(proof.Message, "."))
			switch proof.Code {
			case shim.CodeCreateFailed, shim.CodeStartFailed, shim.CodeExited, shim.CodeTimeout, shim.CodeUnreachable, shim.CodeCancelled, shim.CodeInternal:
				f.Transient = true // containerd may still be coming up
			default:
				// What was not found, or ran nothing, is the same in a minute.
			}
		}
		if s.Required != nil && !*s.Required {
			warn("%s", f.Error())
			continue
		}
		failed = append(failed, f)
	}
	return proven, errors.Join(failed...)
}
