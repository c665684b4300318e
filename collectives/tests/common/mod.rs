//! Ranks that are threads.

use pillion_collectives::{Communicator, Launch, Options};

/// Runs `program` on the ranks of a job, and returns what each returned.
pub(crate) fn run<R: Send>(
    launches: Vec<Launch>,
    options: Options,
    program: impl Fn(&Launch, Communicator) -> R + Sync,
) -> Vec<R> {
    std::thread::scope(|scope| {
        let start = |launch: Launch| {
            let (options, program) = (options.clone(), &program);
            scope.spawn(move || {
                let communicator = Communicator::connect(&launch, options).expect("ranks of this process meet");
                program(&launch, communicator)
            })
        };
        let ranks: Vec<_> = launches.into_iter().map(start).collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank does not panic")).collect()
    })
}
