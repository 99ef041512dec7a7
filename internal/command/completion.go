package command

import (
	"io"
	"strings"

	"github.com/urfave/cli/v2"
)

// CompletionRequest is the library's last argument that asks for suggestions
// instead of running the command.
const CompletionRequest = "--generate-bash-completion"

// Completion is the command that prints scripts for shells. What says what
// they complete, such as "commands and options".
func Completion(program, what string) *cli.Command {
	shell := func(name, usage, script string) *cli.Command {
		return &cli.Command{
			Name: name, Usage: usage,
			Action: func(c *cli.Context) error {
				if err := NoArguments(c); err != nil {
					return err
				}
				_, err := io.WriteString(c.App.Writer, strings.ReplaceAll(script, "PROGRAM", program))
				return err
			},
		}
	}
	return &cli.Command{
		Name:  "completion",
		Usage: "print a script that completes " + what + " in a shell",
		Description: strings.ReplaceAll("Put it where the shell finds it, or try it in the running shell:\n\n"+
			"   bash:        source <(PROGRAM completion bash)\n"+
			"   zsh:         source <(PROGRAM completion zsh)\n"+
			"   fish:        PROGRAM completion fish | source\n"+
			"   PowerShell:  PROGRAM completion powershell | Out-String | Invoke-Expression", "PROGRAM", program),
		Subcommands: []*cli.Command{
			shell("bash", "print the script for bash", bashCompletion),
			shell("zsh", "print the script for zsh", zshCompletion),
			{
				Name: "fish", Usage: "print the script for fish",
				Action: func(c *cli.Context) error {
					if err := NoArguments(c); err != nil {
						return err
					}
					script, err := c.App.ToFishCompletion()
					if err != nil {
						return err
					}
					_, err = io.WriteString(c.App.Writer, script+"\n")
					return err
				},
			},
			shell("powershell", "print the script for PowerShell", powershellCompletion),
		},
	}
}

// In all three scripts the word under the cursor is passed on only when it
// begins an option: the program then suggests options, else commands and names.
// Two dashes alone become one: after two the library takes everything for an
// argument, the request for suggestions included, and runs the command.

const bashCompletion = `# bash completion for PROGRAM
_PROGRAM_complete() {
  local current="${COMP_WORDS[COMP_CWORD]}" suggestions
  local -a words=("${COMP_WORDS[@]:0:COMP_CWORD}")
  case "$current" in
    --) words+=(-) ;;
    -*) words+=("$current") ;;
  esac
  suggestions="$("${words[@]}" ` + CompletionRequest + ` 2>/dev/null)"
  COMPREPLY=($(compgen -W "$suggestions" -- "$current"))
}
complete -o bashdefault -o default -F _PROGRAM_complete PROGRAM
`

const zshCompletion = `#compdef PROGRAM
# zsh completion for PROGRAM
_PROGRAM_complete() {
  local -a line suggestions
  line=("${(@)words[1,CURRENT-1]}")
  case "${words[CURRENT]}" in
    --) line+=(-) ;;
    -*) line+=("${words[CURRENT]}") ;;
  esac
  suggestions=("${(@f)$(_CLI_ZSH_AUTOCOMPLETE_HACK=1 "${line[@]}" ` + CompletionRequest + ` 2>/dev/null)}")
  if [[ -n "${suggestions[1]}" ]]; then
    _describe 'suggestion' suggestions
  else
    _files
  fi
}
compdef _PROGRAM_complete PROGRAM
`

const powershellCompletion = `# PowerShell completion for PROGRAM
Register-ArgumentCompleter -Native -CommandName PROGRAM -ScriptBlock {
  param($wordToComplete, $commandAst, $cursorPosition)
  $words = @($commandAst.CommandElements | Select-Object -Skip 1 | ForEach-Object { $_.ToString() })
  if ($wordToComplete -ne '' -and -not $wordToComplete.StartsWith('-') -and $words.Count -gt 0) {
    $words = @($words | Select-Object -SkipLast 1)
  }
  if ($wordToComplete -eq '--') { $words[-1] = '-' }
  & PROGRAM @words ` + CompletionRequest + ` 2>$null |
    Where-Object { $_ -like "$wordToComplete*" } |
    ForEach-Object { [System.Management.Automation.CompletionResult]::new($_, $_, 'ParameterValue', $_) }
}
`
