//! Ranks that are threads.

// Each test file uses its own part.
#![allow(dead_code)]

use pillion_collectives::{Communicator, Launch, Meeting, Options};

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

/// Launches, for a job over TCP, of as many ranks on each host as each of `hosts` says, as two
/// launchers would describe them: the job has another name on each host.
pub(crate) fn launches(hosts: &[usize], named: bool) -> Vec<Launch> {
    let address = Meeting::free_address().unwrap();
    let meeting = Meeting { address: address.to_string(), secret: format!("tests {address}") };
    let world = hosts.iter().sum();
    let places = hosts.iter().enumerate().flat_map(|(host, &ranks)| (0..ranks).map(move |local| (host, local)));
    let names: Vec<String> = hosts.iter().map(|_| Launch::threads(1).remove(0).job).collect();
    let launch = |(rank, (host, local)): (usize, (usize, usize))| Launch {
        rank,
        world,
        local_rank: local,
        local_world: hosts[host],
        job: names[host].clone(),
        host: named.then(|| format!("host{host}")),
        meeting: Some(meeting.clone()),
        ..Launch::single()
    };
    places.enumerate().map(launch).collect()
}
