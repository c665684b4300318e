//! Operations whose parts have lengths of their own, against their definition.

use crate::{Number, Rank, WORLDS, ranks};
use half::bf16;
use pillion_collectives::{Communicator, Error, Launch, Options, Parts, Reduction};
use pillion_kernels::{Cpu, DType, Device, Event};

/// Elements of a rank's part: none, few, many, in turn.
fn length(len: usize, rank: usize) -> usize {
    [len, 0, len / 2 + 1, 3 * len + 1, 7][rank % 5]
}

impl Rank<'_> {
    /// Parts that have these elements: in one buffer with room behind them, or in one each.
    fn parts<T: Number>(&self, data: &[Vec<T>], is_list: bool, is_input: bool) -> Parts {
        if is_list {
            return Parts::list(data.iter().map(|part| self.buffer(part, is_input)).collect());
        }
        let lengths: Vec<usize> = data.iter().map(Vec::len).collect();
        let whole: Vec<T> = data.iter().flatten().copied().chain([T::new(998, 998); 5]).collect();
        Parts::cut(self.buffer(&whole, is_input), &lengths).unwrap()
    }

    /// Parts of these lengths, with what no operation leaves.
    fn blank<T: Number>(&self, lengths: &[usize], is_list: bool) -> Parts {
        let data: Vec<Vec<T>> = lengths.iter().map(|&len| vec![T::new(999, 999); len]).collect();
        self.parts(&data, is_list, false)
    }

    fn check_parts<T: Number>(&self, what: &str, parts: Parts, is_list: bool, expected: &[Vec<T>]) {
        let buffers = parts.into_buffers();
        if is_list {
            assert_eq!(buffers.len(), expected.len());
            buffers.iter().zip(expected).for_each(|(buffer, expected)| self.check(what, buffer, expected));
        } else {
            let whole: Vec<T> = expected.iter().flatten().copied().chain([T::new(998, 998); 5]).collect();
            self.check(what, &buffers[0], &whole);
        }
    }

    fn moves_parts<T: Number>(&self, len: usize, is_list: bool) {
        let (c, rank, world) = (self.communicator, self.communicator.rank(), self.communicator.world());
        let lengths: Vec<usize> = (0..world).map(|rank| length(len, rank)).collect();
        let shards: Vec<Vec<T>> = (0..world).map(|rank| self.values::<T>(rank, lengths[rank])).collect();
        let shard = || self.buffer(&shards[rank], true);

        let output = self.blank::<T>(&lengths, is_list);
        let (own, output) = self.done(c.all_gather_v(shard(), output, self.start()));
        self.check_parts("all-gather-v", output, is_list, &shards);
        self.check("all-gather-v's input", &own, &shards[rank]);

        let mut data: Vec<Vec<T>> = lengths.iter().map(|&len| vec![T::new(999, 999); len]).collect();
        data[rank] = shards[rank].clone();
        let parts = self.done(c.all_gather_v_in_place(self.parts(&data, is_list, true), self.start()));
        self.check_parts("all-gather-v in place", parts, is_list, &shards);

        for root in [0, world - 1] {
            let output = (rank == root).then(|| self.blank::<T>(&lengths, is_list && root == 0));
            let (_, output) = self.done(c.gather_v(shard(), output, root, self.start()));
            if let Some(output) = output {
                self.check_parts("gather-v", output, is_list && root == 0, &shards);
            }
            let input = self.parts(&shards, is_list, true);
            let output = self.output::<T>(lengths[rank]);
            let (_, output) = self.done(c.scatter_v((rank == root).then_some(input), output, root, self.start()));
            self.check("scatter-v", &output, &shards[rank]);
        }

        // From rank p to rank q: elements of a row of p's values.
        let count = |from: usize, to: usize| length(len, from + 2 * to);
        let part = |from: usize, to: usize| -> Vec<T> {
            let first: usize = (0..to).map(|to| count(from, to)).sum();
            self.values::<T>(from, first + count(from, to))[first..].to_vec()
        };
        let sent: Vec<Vec<T>> = (0..world).map(|to| part(rank, to)).collect();
        let received: Vec<Vec<T>> = (0..world).map(|from| part(from, rank)).collect();
        let lengths: Vec<usize> = received.iter().map(Vec::len).collect();
        let (input, blank) = (self.parts(&sent, is_list, true), self.blank::<T>(&lengths, is_list));
        let (input, output) = self.done(c.all_to_all_v(input, blank, self.start()));
        self.check_parts("all-to-all-v", output, is_list, &received);
        self.check_parts("all-to-all-v's input", input, is_list, &sent);
    }

    fn folds_parts<T: Number>(&self, len: usize, reduction: Reduction, is_list: bool) {
        let (c, rank, world) = (self.communicator, self.communicator.rank(), self.communicator.world());
        let lengths: Vec<usize> = (0..world).map(|rank| length(len, rank)).collect();
        let cut = |values: Vec<T>| -> Vec<Vec<T>> {
            let mut rest = values.into_iter();
            lengths.iter().map(|&len| rest.by_ref().take(len).collect()).collect()
        };
        let own = cut(self.values::<T>(rank, lengths.iter().sum()));
        let first: usize = lengths[..rank].iter().sum();
        let mine = self.combined::<T>(first, lengths[rank], reduction);
        let (input, output) = (self.parts(&own, is_list, true), self.output::<T>(lengths[rank]));
        let (input, output) = self.done(c.reduce_scatter_v(input, output, reduction, self.start()));
        self.check("reduce-scatter-v", &output, &mine);
        self.check_parts("reduce-scatter-v's input", input, is_list, &own);
        let mut expected = own.clone();
        expected[rank] = mine;
        let parts = self.done(c.reduce_scatter_v_in_place(self.parts(&own, is_list, true), reduction, self.start()));
        self.check_parts("reduce-scatter-v in place", parts, is_list, &expected);
    }
}

#[test]
fn parts_of_any_lengths_move_and_combine() {
    for (world, hosts, groups) in WORLDS {
        ranks(world, hosts, groups, |rank| {
            for is_list in [false, true] {
                for len in [0, 1, 100, 5_000, 40_001] {
                    rank.moves_parts::<f32>(len, is_list);
                    rank.folds_parts::<f32>(len, Reduction::Sum, is_list);
                }
                rank.moves_parts::<bf16>(999, is_list);
                rank.moves_parts::<u8>(77, is_list);
                rank.folds_parts::<bf16>(1_003, Reduction::Avg, is_list);
                rank.folds_parts::<i64>(333, Reduction::BitXor, is_list);
            }
        });
    }
}

/// What each of the ranks is told when the lengths of two differ.
fn told(hosts: usize, parts: [&str; 2], call: impl Fn(&Communicator) -> Result<(), Error> + Sync) {
    let errors = std::thread::scope(|scope| {
        let start = |launch: Launch| {
            let call = &call;
            scope.spawn(move || {
                let options = Options { simulated_hosts: hosts, ..Options::default() };
                let communicator = Communicator::connect(&launch, options).unwrap();
                // Between hosts a rank may be told once it waits for the other.
                let error = call(&communicator).and_then(|()| communicator.barrier()).unwrap_err();
                assert_eq!(communicator.healthy().unwrap_err().to_string(), error.to_string());
                error
            })
        };
        let ranks: Vec<_> = Launch::threads(3).into_iter().map(start).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<Error>>()
    });
    let text = errors.iter().map(Error::to_string).collect::<Vec<String>>().join("\n");
    assert!(errors.iter().any(|error| matches!(error, Error::Mismatch { .. })), "{text}");
    for error in &errors {
        assert!(matches!(error, Error::Mismatch { .. } | Error::Aborted { .. } | Error::PeerLost { .. }), "{text}");
    }
    assert!(parts.iter().all(|part| text.contains(part)), "{text}");
}

#[test]
fn lengths_that_differ_between_ranks_are_named_by_all() {
    let buffer = |len| Cpu.allocate(DType::F32, len).unwrap();
    let parts = |lengths: &[usize]| Parts::list(lengths.iter().map(|&len| buffer(len)).collect());
    for hosts in [1, 3] {
        told(hosts, ["5 × f32", "4 × f32"], |c| {
            let sent = if c.rank() == 2 { [1, 5, 1] } else { [1, 1, 1] };
            let received = if c.rank() == 1 { [1, 1, 4] } else { [1, 1, 1] };
            c.all_to_all_v(parts(&sent), parts(&received), Event::PAST).wait().map(|_| ())
        });
        told(hosts, ["5 × f32", "4 × f32"], |c| {
            let output = if c.rank() == 0 { [5, 5, 5] } else { [5, 4, 5] };
            let own = output[c.rank()];
            c.all_gather_v(buffer(own), parts(&output), Event::PAST).wait().map(|_| ())
        });
        told(hosts, ["5 × f32", "4 × f32"], |c| {
            let input = (c.rank() == 1).then(|| parts(&[5, 1, 1]));
            c.scatter_v(input, buffer([4, 1, 1][c.rank()]), 1, Event::PAST).wait().map(|_| ())
        });
        told(hosts, ["5 × f32", "4 × f32"], |c| {
            let output = (c.rank() == 1).then(|| parts(&[5, 1, 1]));
            c.gather_v(buffer([4, 1, 1][c.rank()]), output, 1, Event::PAST).wait().map(|_| ())
        });
        told(hosts, ["5 × f32", "4 × f32"], |c| {
            let input = if c.rank() == 1 { [5, 2, 2] } else { [4, 2, 3] };
            let output = buffer(input[c.rank()]);
            c.reduce_scatter_v(parts(&input), output, Reduction::Sum, Event::PAST).wait().map(|_| ())
        });
        // A digest of 16 bits would not tell these apart.
        told(hosts, ["115 × f32", "139 × f32"], |c| {
            let input = if c.rank() == 1 { [139, 775, 3] } else { [115, 799, 3] };
            let output = buffer(input[c.rank()]);
            c.reduce_scatter_v(parts(&input), output, Reduction::Sum, Event::PAST).wait().map(|_| ())
        });
    }
}
