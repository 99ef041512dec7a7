package shim

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"

	toml "github.com/pelletier/go-toml/v2"
)

const (
	// maxConfig bounds one configuration file, and the configuration that CRI
	// reports; k3s renders some 3 KB.
	maxConfig = 1 << 20
	// maxImports bounds the files one configuration pulls in.
	maxImports = 32
	// maxHandlers bounds the runtime handlers taken from one source.
	maxHandlers = 256
)

// handlerConfig is one [… containerd.runtimes.<handler>] table.
type handlerConfig struct {
	Type        string         `toml:"runtime_type" json:"runtimeType"`
	Path        string         `toml:"runtime_path" json:"runtimePath"`
	Snapshotter string         `toml:"snapshotter" json:"snapshotter"`
	Options     map[string]any `toml:"options" json:"options"`
}

type criPlugin struct {
	// Snapshotter is here in version 3's images plugin …
	Snapshotter string `toml:"snapshotter"`
	Containerd  struct {
		// … and here in version 2.
		Snapshotter string                   `toml:"snapshotter"`
		Runtimes    map[string]handlerConfig `toml:"runtimes"`
	} `toml:"containerd"`
}

type containerdConfig struct {
	Imports []string `toml:"imports"`
	Plugins struct {
		// The CRI plugin's name in configuration version 2 (containerd 1.x)
		// and in version 3 (containerd 2.x).
		V2 criPlugin `toml:"io.containerd.grpc.v1.cri"`
		V3 criPlugin `toml:"io.containerd.cri.v1.runtime"`
		// Version 3 moved what concerns images into a plugin of its own.
		V3Images criPlugin `toml:"io.containerd.cri.v1.images"`
	} `toml:"plugins"`
}

// parseConfig reads the runtime handlers of a containerd configuration,
// version 2 or 3, and the patterns of the files it imports.
func parseConfig(data []byte) (handlers map[string]handlerConfig, imports []string, err error) {
	if len(data) > maxConfig {
		return nil, nil, fmt.Errorf("reading containerd's configuration: larger than %d bytes", maxConfig)
	}
	var config containerdConfig
	if err := toml.Unmarshal(data, &config); err != nil {
		return nil, nil, fmt.Errorf("reading containerd's configuration: %w", err)
	}
	handlers = map[string]handlerConfig{}
	for _, plugin := range []criPlugin{config.Plugins.V2, config.Plugins.V3} {
		maps.Copy(handlers, plugin.Containerd.Runtimes)
	}
	snapshotter := cmp.Or(config.Plugins.V3Images.Snapshotter, config.Plugins.V2.Containerd.Snapshotter)
	for name, handler := range handlers {
		handler.Snapshotter = cmp.Or(handler.Snapshotter, snapshotter)
		handlers[name] = handler
	}
	if len(handlers) > maxHandlers {
		return nil, nil, fmt.Errorf("reading containerd's configuration: more than %d runtime handlers", maxHandlers)
	}
	return handlers, config.Imports, nil
}

// readConfig reads a configuration file of the node and what it imports, one
// level deep as k3s's templates do; later files win. path is absolute on the
// node, root is where the node's file system is seen.
func readConfig(root, path string) (map[string]handlerConfig, error) {
	data, err := readBounded(filepath.Join(root, path))
	if err != nil {
		return nil, err
	}
	handlers, patterns, err := parseConfig(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	files := 0
	for _, pattern := range patterns {
		if !filepath.IsAbs(pattern) {
			pattern = filepath.Join(filepath.Dir(path), pattern)
		}
		matches, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			return nil, fmt.Errorf("%s: import %q: %w", path, pattern, err)
		}
		for _, match := range matches {
			if files++; files > maxImports {
				return nil, fmt.Errorf("%s: imports more than %d files", path, maxImports)
			}
			data, err := readBounded(match)
			if err != nil {
				return nil, err
			}
			imported, _, err := parseConfig(data)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", match, err)
			}
			maps.Copy(handlers, imported)
		}
	}
	return handlers, nil
}

func readBounded(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("reading containerd's configuration: %w", err)
	}
	if !info.Mode().IsRegular() || info.Size() > maxConfig {
		return nil, fmt.Errorf("reading containerd's configuration: %s is not a file of at most %d bytes", path, maxConfig)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading containerd's configuration: %w", err)
	}
	return data, nil
}

// parseCRIConfig reads the member "config" of CRI's verbose status: the JSON
// of containerd's CRI plugin (internal/cri/config), in 1.7 and 2.x alike.
func parseCRIConfig(data string) (map[string]handlerConfig, error) {
	if len(data) > maxConfig {
		return nil, fmt.Errorf("reading the CRI configuration: larger than %d bytes", maxConfig)
	}
	var config struct {
		Containerd struct {
			Runtimes map[string]handlerConfig `json:"runtimes"`
		} `json:"containerd"`
	}
	decoder := json.NewDecoder(bytes.NewReader([]byte(data)))
	decoder.UseNumber() // an integer option must not come out as 1.0
	if err := decoder.Decode(&config); err != nil {
		return nil, fmt.Errorf("reading the CRI configuration: %w", err)
	}
	handlers := config.Containerd.Runtimes
	if len(handlers) > maxHandlers {
		return nil, fmt.Errorf("reading the CRI configuration: more than %d runtime handlers", maxHandlers)
	}
	for name, handler := range handlers {
		for key, value := range handler.Options {
			handler.Options[key] = plainNumbers(value)
		}
		handlers[name] = handler
	}
	return handlers, nil
}

// plainNumbers turns json.Number into int64 or float64, at any depth.
func plainNumbers(value any) any {
	switch value := value.(type) {
	case json.Number:
		if whole, err := value.Int64(); err == nil {
			return whole
		}
		if float, err := value.Float64(); err == nil {
			return float
		}
		return value.String()
	case map[string]any:
		for key, member := range value {
			value[key] = plainNumbers(member)
		}
	case []any:
		for i, member := range value {
			value[i] = plainNumbers(member)
		}
	}
	return value
}

// parseEnviron finds PATH in the content of /proc/<pid>/environ.
func parseEnviron(environ []byte) (path []string, ok bool) {
	for variable := range strings.SplitSeq(string(environ), "\x00") {
		if value, found := strings.CutPrefix(variable, "PATH="); found {
			for _, directory := range filepath.SplitList(value) {
				if filepath.IsAbs(directory) {
					path = append(path, filepath.Clean(directory))
				}
			}
			return path, true
		}
	}
	return nil, false
}
