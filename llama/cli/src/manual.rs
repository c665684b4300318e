//! `pillion completions` and `pillion man`: the command line as shells and packages want it. Both
//! are made of the definitions of the flags.

use std::path::PathBuf;

use clap::{Args, Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::settings::Cli;
use crate::{Error, output};

/// Settings of `completions`.
#[derive(Clone, Debug, Args)]
pub struct CompletionsArgs {
    /// The shell.
    #[arg(value_enum, value_name = "SHELL")]
    pub shell: Shell,
}

/// Settings of `man`.
#[derive(Clone, Debug, Args)]
pub struct ManArgs {
    /// Folder to write pillion.1 and a page for each command into, such as share/man/man1; without
    /// it, pillion.1 is printed.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// `pillion completions`. Returns the exit code.
///
/// # Errors
/// When stdout takes nothing more.
pub(crate) fn completions(args: &CompletionsArgs) -> Result<i32, Error> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "pillion", &mut script);
    output::write(&String::from_utf8_lossy(&script)).map(|_| 0)
}

/// `pillion man`. Returns the exit code.
///
/// # Errors
/// When a page cannot be written, or stdout takes nothing more.
pub(crate) fn man(args: &ManArgs) -> Result<i32, Error> {
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let Some(folder) = &args.out else {
        return output::write(&String::from_utf8_lossy(&page(command)?)).map(|_| 0);
    };
    std::fs::create_dir_all(folder)
        .map_err(|error| Error::file(folder, format!("{error}: choose another folder with --out DIR")))?;
    for (name, command) in all(command) {
        output::replace_file(&folder.join(format!("{name}.1")), &page(command)?)?;
    }
    Ok(0)
}

/// A command and all below it, each with the name of its page: `pillion-config-check`.
fn all(command: Command) -> Vec<(String, Command)> {
    let name = command.get_display_name().unwrap_or(command.get_name()).to_owned();
    let below: Vec<_> = command.get_subcommands().cloned().flat_map(all).collect();
    [(name, command)].into_iter().chain(below).collect()
}

/// The page of a command, in roff.
fn page(command: Command) -> Result<Vec<u8>, Error> {
    let mut page = Vec::new();
    let manual = Man::new(command).source(concat!("pillion ", env!("CARGO_PKG_VERSION"))).manual("Pillion");
    manual.render(&mut page).map_err(Error::Stdout)?;
    Ok(page)
}
