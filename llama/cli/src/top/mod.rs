//! `pillion top`: a run as it goes, on a terminal.
//!
//! | file | subject |
//! |---|---|
//! | `watch` | what is known of the run, from its files |
//! | `view` | a frame that shows it |

mod view;
mod watch;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use ratatui::DefaultTerminal;
use ratatui::buffer::Buffer;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::crossterm::terminal;
use ratatui::layout::Rect;

use crate::output::write;
use crate::signals::{self, Second};
use crate::{Error, complain};
use watch::Watch;

/// Settings of `top`.
#[derive(Clone, Debug, Args)]
pub struct TopArgs {
    /// Folder of the run: its --out.
    #[arg(value_name = "RUN", default_value = "runs/train")]
    pub run: PathBuf,
    /// Print one frame as text, and end.
    #[arg(long)]
    pub once: bool,
}

/// How often the files are looked at.
const EVERY: Duration = Duration::from_millis(250);
/// Columns and rows of a frame where there is no terminal.
const SIZE: (u16, u16) = (100, 30);

/// Shows the run until a key or a signal ends it.
///
/// # Errors
/// When there is no run, or no terminal. With `--once` also when its metrics are damaged.
pub(crate) fn top(settings: &TopArgs) -> Result<i32, Error> {
    let mut watch = Watch::open(&settings.run)?;
    if settings.once {
        return once(watch);
    }
    if !(std::io::stdout().is_terminal() && std::io::stdin().is_terminal()) {
        let remedy = "give --once for one frame as text";
        return Err(Error::Setting(format!("top draws on a terminal, and stdin or stdout is none: {remedy}")));
    }
    let stop = signals::flag(Second::Waits)?;
    let shown = ratatui::try_init().and_then(|terminal| show(terminal, &mut watch, &stop));
    if let Err(error) = ratatui::try_restore() {
        complain(format_args!("the terminal is not as it was ({error}): `reset` helps"));
    }
    shown.map(|()| 0).map_err(Error::Stdout)
}

/// Prints a frame.
fn once(watch: Watch) -> Result<i32, Error> {
    let size = if std::io::stdout().is_terminal() { terminal::size().unwrap_or(SIZE) } else { SIZE };
    let area = Rect::new(0, 0, size.0, size.1);
    let mut frame = Buffer::empty(area);
    view::draw(&watch, watch.since_last(), area, &mut frame);
    let row = |y: u16| {
        let cells = (0..area.width).map(|x| frame[(x, y)].symbol());
        format!("{}\n", cells.collect::<String>().trim_end())
    };
    // The last row is of keys.
    write(&(0..area.height.saturating_sub(1)).map(row).collect::<String>())?;
    watch.into_fault().map_or(Ok(0), Err)
}

/// Draws frames until `q`, Escape or Ctrl-C is pressed, or `stop` is raised.
fn show(mut terminal: DefaultTerminal, watch: &mut Watch, stop: &AtomicBool) -> std::io::Result<()> {
    while !stop.load(Ordering::Relaxed) {
        watch.follow();
        terminal.draw(|frame| view::draw(watch, watch.since_last(), frame.area(), frame.buffer_mut()))?;
        if event::poll(EVERY)? && ends(&event::read()?) {
            break;
        }
    }
    Ok(())
}

/// Whether a key leaves.
fn ends(event: &Event) -> bool {
    let Event::Key(key) = event else { return false };
    let control_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    key.kind == KeyEventKind::Press && (control_c || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc))
}
