//! Rows of a table.

use crate::bounded::{Bounded, dot, exact, sum};
use crate::common::{TYPES, assert_gradient, assert_within, integers, normals, normals_as, run};

/// N, V, C: more tokens than rows, so that tokens repeat, and fewer.
const SHAPES: [(usize, usize, usize); 7] =
    [(1, 1, 1), (3, 15, 7), (33, 3, 15), (7 * 15, 33, 3), (257, 64, 3), (64, 65, 257), (7, 300, 64)];

#[test]
fn forward_copies_rows_exactly() {
    for (tokens, vocab, width) in SHAPES {
        for dtype in TYPES {
            let (table, ids) = (normals_as(dtype, vocab * width, 1), integers(tokens, vocab, 2));
            let [out] = run(|stage| {
                let (mut out, table, ids) =
                    (stage.output(tokens * width), stage.buffer_as(dtype, &table), stage.buffer(&ids));
                stage.kernels().embedding(out.view_mut(), table.view(), ids.view());
                [out]
            });
            let expected: Vec<f32> =
                ids.iter().flat_map(|&id| &table[id as usize * width..][..width]).copied().collect();
            assert_eq!(out.of::<f32>(), expected);
        }
    }
}

#[test]
fn backward_adds_up_the_gradients_of_each_row() {
    for (tokens, vocab, width) in SHAPES {
        let (ids, grad_out, before) =
            (integers(tokens, vocab, 2), normals(tokens * width, 3), normals(vocab * width, 4));
        let [grad_table] = run(|stage| {
            let (mut grad_table, grad_out, ids) = (stage.buffer(&before), stage.buffer(&grad_out), stage.buffer(&ids));
            stage.kernels().embedding_backward(grad_table.view_mut(), grad_out.view(), ids.view());
            [grad_table]
        });
        let terms = |index: usize| {
            let (row, column) = (index / width, index % width);
            let uses = ids.iter().enumerate().filter(move |&(_, &id)| id as usize == row);
            uses.map(|(n, _)| Bounded::exact(grad_out[n * width + column])).collect::<Vec<_>>()
        };
        let gradient: Vec<Bounded> = (0..vocab * width).map(|index| sum(terms(index))).collect();
        let direction = exact(&grad_out);
        assert_gradient(&[&normals(vocab * width, 1)], &[&gradient], |inputs| {
            let rows: Vec<Bounded> =
                ids.iter().flat_map(|&id| &inputs[0][id as usize * width..][..width]).copied().collect();
            dot(&rows, &direction)
        });
        let expected: Vec<Bounded> = (0..vocab * width)
            .map(|index| sum([Bounded::exact(before[index])].into_iter().chain(terms(index))))
            .collect();
        assert_within("grad_table", &grad_table.of(), &expected);
    }
}
