package paths

import "testing"

func TestDataDirFollowsXDG(t *testing.T) {
	tests := []struct{ name, xdg, home, want string }{
		{"XDG_DATA_HOME wins", "/srv/data", "/home/ann", "/srv/data/hearth"},
		{"a relative XDG_DATA_HOME is ignored", "data", "/home/ann", "/home/ann/.local/share/hearth"},
		{"the home directory is the default", "", "/home/ann", "/home/ann/.local/share/hearth"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("XDG_DATA_HOME", tt.xdg)
			t.Setenv("HOME", tt.home)
			if got := DataDir(); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

func TestSocketsLieBelowRun(t *testing.T) {
	for got, want := range map[string]string{
		AgentSocket("/d"):  "/d/run/agent.sock",
		APISocket("/d"):    "/d/run/api.sock",
		EngineSocket("/d"): "/d/run/engine.sock",
	} {
		if got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}
