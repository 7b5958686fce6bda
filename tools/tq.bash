# SPDX-License-Identifier: MIT
# Completion of `tq` for bash. `make install` puts it where bash-completion looks; else: source tools/tq.bash
# (zsh: autoload -U bashcompinit && bashcompinit, then source it). It reads the help texts, so it knows what the command knows.

_tq_words() # of a help text: the options, and for `tq --help` the commands
{
    "$@" --help 2>/dev/null | tr -s ' ,|[]{}' '\n' | grep -E '^--?[a-z][a-z-]*$' | sort -u
}

_tq()
{
    local tq=${COMP_WORDS[0]} word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]}
    local command=${COMP_WORDS[1]} words=
    COMPREPLY=()
    if [ "$COMP_CWORD" = 1 ]; then
        words="$("$tq" --help 2>/dev/null | sed -n 's/^  \([a-z]*\)  .*/\1/p') --help --version"
    elif [ "$COMP_CWORD" = 2 ] && [ "$command" = cache ]; then
        words="inspect verify bench simulate --help"
    elif [ "$COMP_CWORD" = 2 ] && [ "$command" = bench ]; then
        words="attention prefill encode --help"
    elif [ "$command" = run ] && [ "$before" = --tool ]; then
        words="completion server bench perplexity"
    elif [ "$before" = --preset ] || [ "$before" = --presets ]; then
        words=$("$tq" presets 2>/dev/null | sed -n 's/^\(TQ[0-9]*\) .*/\1/p')
    elif [ "$before" = --format ] || [ "$before" = --formats ]; then
        words=$("$tq" formats 2>/dev/null | sed -n '2,$s/^\([a-z][a-z0-9_]*\) .*/\1/p')
    elif [ "${word#-}" != "$word" ]; then
        if [ "$command" = cache ]; then
            words=$(_tq_words "$tq" cache "${COMP_WORDS[2]}")
        else
            words=$(_tq_words "$tq" "$command")
        fi
    fi
    if [ -n "$words" ]; then
        # shellcheck disable=SC2207 # no word has a blank
        COMPREPLY=($(compgen -W "$words" -- "$word"))
    fi
}
complete -o default -F _tq tq
