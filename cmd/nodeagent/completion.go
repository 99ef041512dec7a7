package main

import (
	"strings"

	"github.com/urfave/cli/v2"
)

// generateCompletion is the library's last argument that asks for suggestions
// instead of running the command.
const generateCompletion = "--generate-bash-completion"

func completionCommand() *cli.Command {
	shell := func(name, usage, script string) *cli.Command {
		return &cli.Command{
			Name: name, Usage: usage,
			Action: action(func(c *cli.Context) error {
				if err := noArguments(c); err != nil {
					return err
				}
				fprintf(c.App.Writer, "%s", strings.ReplaceAll(script, "NODEAGENT", c.App.Name))
				return nil
			}),
		}
	}
	return &cli.Command{
		Name:  "completion",
		Usage: "print a script that completes commands, options and names of functions in a shell",
		Description: "Put it where the shell finds it, or try it in the running shell:\n\n" +
			"   bash:        source <(nodeagent completion bash)\n" +
			"   zsh:         source <(nodeagent completion zsh)\n" +
			"   fish:        nodeagent completion fish | source\n" +
			"   PowerShell:  nodeagent completion powershell | Out-String | Invoke-Expression",
		Subcommands: []*cli.Command{
			shell("bash", "print the script for bash", bashCompletion),
			shell("zsh", "print the script for zsh", zshCompletion),
			{
				Name: "fish", Usage: "print the script for fish",
				Action: action(func(c *cli.Context) error {
					if err := noArguments(c); err != nil {
						return err
					}
					script, err := c.App.ToFishCompletion()
					if err != nil {
						return err
					}
					fprintf(c.App.Writer, "%s\n", script)
					return nil
				}),
			},
			shell("powershell", "print the script for PowerShell", powershellCompletion),
		},
	}
}

// In all three scripts the word under the cursor is passed on only when it
// begins an option: the program then suggests options, else commands and names.

const bashCompletion = `# bash completion for NODEAGENT
_NODEAGENT_complete() {
  local current="${COMP_WORDS[COMP_CWORD]}" suggestions
  local -a words=("${COMP_WORDS[@]:0:COMP_CWORD}")
  [[ "$current" == -* ]] && words+=("$current")
  suggestions="$("${words[@]}" ` + generateCompletion + ` 2>/dev/null)"
  COMPREPLY=($(compgen -W "$suggestions" -- "$current"))
}
complete -o bashdefault -o default -F _NODEAGENT_complete NODEAGENT
`

const zshCompletion = `#compdef NODEAGENT
# zsh completion for NODEAGENT
_NODEAGENT_complete() {
  local -a line suggestions
  line=("${(@)words[1,CURRENT-1]}")
  [[ "${words[CURRENT]}" == -* ]] && line+=("${words[CURRENT]}")
  suggestions=("${(@f)$(_CLI_ZSH_AUTOCOMPLETE_HACK=1 "${line[@]}" ` + generateCompletion + ` 2>/dev/null)}")
  if [[ -n "${suggestions[1]}" ]]; then
    _describe 'suggestion' suggestions
  else
    _files
  fi
}
compdef _NODEAGENT_complete NODEAGENT
`

const powershellCompletion = `# PowerShell completion for NODEAGENT
Register-ArgumentCompleter -Native -CommandName NODEAGENT -ScriptBlock {
  param($wordToComplete, $commandAst, $cursorPosition)
  $words = @($commandAst.CommandElements | Select-Object -Skip 1 | ForEach-Object { $_.ToString() })
  if ($wordToComplete -ne '' -and -not $wordToComplete.StartsWith('-') -and $words.Count -gt 0) {
    $words = @($words | Select-Object -SkipLast 1)
  }
  & NODEAGENT @words ` + generateCompletion + ` 2>$null |
    Where-Object { $_ -like "$wordToComplete*" } |
    ForEach-Object { [System.Management.Automation.CompletionResult]::new($_, $_, 'ParameterValue', $_) }
}
`
