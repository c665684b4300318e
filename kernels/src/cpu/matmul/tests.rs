use half::bf16;
use proptest::prelude::*;

use super::tile::Portable;
use super::*;

/// Awkward lengths, and whatever is around the sizes of tiles and blocks.
fn length() -> impl Strategy<Value = usize> {
    prop_oneof![8 => 1usize..40, 1 => Just(105), 1 => Just(145), 1 => Just(257), 1 => Just(513), 1 => Just(705)]
}

fn random<T: Value>(len: usize, stream: u64) -> Vec<T> {
    (0..len as u64).map(|index| T::narrow(crate::random::normal(1, stream, index) as f32)).collect()
}

fn matrix<T>(data: &[T], rows: usize, columns: usize, gap: usize, transposed: bool) -> Matrix<&[T]> {
    match transposed {
        true => Matrix::strided(data, columns, rows, rows + gap).transposed(),
        false => Matrix::strided(data, rows, columns, columns + gap),
    }
}

/// What a product is added to, without its borrow.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Before {
    Zero,
    Output,
    From,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    rows: usize,
    inner: usize,
    columns: usize,
    gap: usize,
    transpose: (bool, bool),
    before: Before,
    packed: bool,
}

fn case() -> impl Strategy<Value = Case> {
    let before = prop_oneof![Just(Before::Zero), Just(Before::Output), Just(Before::From)];
    let inner = prop_oneof![1 => Just(0), 9 => length()];
    let columns = prop_oneof![1 => Just(0), 19 => length()];
    (length(), inner, columns, 0usize..3, any::<(bool, bool)>(), before, any::<bool>()).prop_map(
        |(rows, inner, columns, gap, transpose, before, packed)| Case {
            rows,
            inner,
            columns,
            gap,
            transpose,
            before,
            packed,
        },
    )
}

/// Compares with f64 on every set of instructions here, with one thread and three.
fn check<O: Value, T: Value>(case: Case, isas: impl IntoIterator<Item = Isa>) -> Result<(), TestCaseError> {
    let Case { rows, inner, columns, gap, transpose, before, packed } = case;
    let a = random::<T>(rows * (inner + gap) + inner * (rows + gap), 1);
    let b = random::<T>(inner * (columns + gap) + columns * (inner + gap), 2);
    let (a, b) = (matrix(&a[..], rows, inner, gap, transpose.0), matrix(&b[..], inner, columns, gap, transpose.1));
    let (was, from) = (random::<O>(rows * (columns + gap), 3), random::<f32>(rows * (columns + gap), 4));
    // Not a power of two, so that it rounds; for narrow elements 1, which the fastest path takes.
    let alpha = if O::NARROW || case.gap == 1 { 1.0 } else { 0.7f32 };
    let of_a = |i: usize, k: usize| f64::from(a.data[i * a.row_stride + k * a.column_stride].widen());
    let of_b = |k: usize, j: usize| f64::from(b.data[k * b.row_stride + j * b.column_stride].widen());
    // The sum, and how far from it a product may be.
    let expected: Vec<(f64, f64)> = (0..rows * (columns + gap))
        .map(|index| {
            let (row, column) = (index / (columns + gap), index % (columns + gap));
            let added = match before {
                Before::Zero => 0.0,
                Before::Output => f64::from(was[index].widen()),
                Before::From => f64::from(from[index]),
            };
            let inner = if column < columns { inner } else { 0 };
            let terms = (0..inner).map(|k| f64::from(alpha) * of_a(row, k) * of_b(k, column));
            let (sum, magnitude) =
                terms.fold((added, added.abs()), |(sum, magnitude), term| (sum + term, magnitude + term.abs()));
            // A sum of n products in any order is off by at most (n + 1)·u·Σ|terms| (Higham 2002, section 3.1), u = 2⁻²⁴; one more
            // for alpha, and for each block of steps the one more that adds its sum. AMX adds pairs, rounded in any order, and
            // flushes what is below 2⁻¹²⁶, which no term here is. A narrow result is rounded once more, by at most 2⁻⁸ of it.
            let bound = (inner as f64 + 3.0 + (inner / Portable::DEPTH) as f64) * 2f64.powi(-24) * magnitude;
            let rounding = if O::NARROW { (sum.abs() + bound) * 2f64.powi(-8) } else { 0.0 };
            (sum, bound + rounding)
        })
        .collect();
    for isa in isas {
        let mut panels = Panels::new();
        if packed {
            panels.pack_on(isa, b);
        }
        let right = if packed { panels.part(0, 0) } else { Right::Matrix(b) };
        let start = match before {
            Before::Zero => Start::Zero,
            Before::Output => Start::Output,
            Before::From => Start::From(&from),
        };
        let mut out = was.clone();
        let on = |team: &Team, out: &mut [O]| {
            product_on(isa, team, Matrix::strided(out, rows, columns, columns + gap), start, a, right, alpha);
        };
        on(&Team::default(), &mut out);
        let mut by_three = was.clone();
        on(&Team::new(3).unwrap(), &mut by_three);
        prop_assert!(
            bytemuck::cast_slice::<O, u8>(&out) == bytemuck::cast_slice::<O, u8>(&by_three),
            "threads change bits on {}",
            isa.name()
        );
        for (index, (&got, &was)) in out.iter().zip(&was).enumerate() {
            let (got, (sum, bound)) = (f64::from(got.widen()), expected[index]);
            if index % (columns + gap) >= columns {
                prop_assert_eq!(got, f64::from(was.widen()), "a gap between rows was written");
            } else {
                prop_assert!((got - sum).abs() <= bound, "{} on {}: {} against {}", index, isa.name(), got, sum);
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn products_agree_with_f64(case in case()) {
        check::<f32, f32>(case, Isa::available())?;
        check::<f32, bf16>(case, Isa::available())?;
    }

    #[test]
    fn rounded_products_agree_with_f64(case in case()) {
        let case = Case { before: Before::Zero, ..case };
        check::<bf16, bf16>(case, Isa::available())?;
        check::<bf16, f32>(case, Isa::available())?;
    }
}

/// The AMX path where the processor has none.
#[cfg(target_arch = "x86_64")]
mod emulated {
    use super::*;

    fn check_on_tiles<O: Value>(case: Case) -> Result<(), TestCaseError> {
        if !Isa::available().any(|isa| isa == Isa::Avx2) {
            println!("SKIPPED: panels of tiles are packed with AVX2");
            return Ok(());
        }
        emulator::install();
        check::<O, bf16>(case, [Isa::Amx])
    }

    proptest! {
        // Each instruction is a signal.
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn products_of_tiles_agree_with_f64(case in case()) {
            check_on_tiles::<f32>(case)?;
            check_on_tiles::<bf16>(Case { before: Before::Zero, ..case })?;
        }
    }

    #[test]
    fn whole_tiles_in_several_blocks_agree_with_f64() {
        for transpose in [(false, false), (false, true), (true, false), (true, true)] {
            let (rows, inner, columns) = (64, amx::Amx::DEPTH + 64, 96);
            let case = Case { rows, inner, columns, gap: 0, transpose, before: Before::Zero, packed: transpose.0 };
            check_on_tiles::<f32>(Case { before: Before::Output, gap: 1, ..case }).unwrap();
            check_on_tiles::<bf16>(case).unwrap();
        }
    }
}

#[test]
fn a_part_of_an_output_has_the_bits_that_it_has_in_the_whole() {
    let (rows, inner, columns) = (50, 300, 70);
    let (a, b) = (random::<f32>(rows * inner, 1), random::<f32>(inner * columns, 2));
    let mut whole = vec![0.0f32; rows * columns];
    let (a, b) = (Matrix::dense(&a[..], rows, inner), Matrix::dense(&b[..], inner, columns));
    let alone = Team::default();
    product(&alone, Matrix::dense(&mut whole[..], rows, columns), Start::Zero, a, Right::Matrix(b), 0.7);
    for (first, count) in [(0, 50), (7, 20), (49, 1)] {
        let mut part = vec![0.0f32; count * columns];
        let a = Matrix::dense(&a.data[first * inner..], count, inner);
        product(&alone, Matrix::dense(&mut part[..], count, columns), Start::Zero, a, Right::Matrix(b), 0.7);
        assert_eq!(part, whole[first * columns..][..count * columns]);
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    for isa in Isa::available() {
        for dim in [16, 32, 48, 64, 96, 128, 192, 256] {
            let inner = (1 << 20) / (dim * dim) + 1;
            let (a, b) = (random::<f32>(dim * inner, 1), random::<f32>(inner * dim, 2));
            let (a, b) = (Matrix::dense(&a[..], dim, inner), Right::Matrix(Matrix::dense(&b[..], inner, dim)));
            let product = |threads: usize| {
                let mut out = vec![0.0f32; dim * dim];
                let team = &TEAMS.get_or_init(|| (1..=24).map(|n| Team::new(n).unwrap()).collect())[threads - 1];
                product_on(isa, team, Matrix::dense(&mut out[..], dim, dim), Start::Zero, a, b, 1.0);
                out
            };
            let alone = product(1);
            for threads in 2..=24 {
                assert!(product(threads) == alone, "{threads} threads, {dim}, {}", isa.name());
            }
        }
    }
}

static TEAMS: std::sync::OnceLock<Vec<Team>> = std::sync::OnceLock::new();

#[test]
fn a_part_of_packed_panels_is_that_part_of_the_matrix() {
    let (rows, inner, columns) = (20, 128, 96);
    let (a, b) = (random::<bf16>(rows * inner, 1), random::<bf16>(inner * columns, 2));
    let b = Matrix::dense(&b[..], inner, columns);
    let mut panels = Panels::new();
    panels.pack(b);
    for (row, count, column, width) in [(0, 128, 0, 96), (32, 64, 32, 33), (96, 32, 64, 1)] {
        let a = Matrix::strided(&a[..], rows, count, inner);
        let part = Matrix::strided(&b.data[row * columns + column..], count, width, columns);
        let (mut by_panels, mut by_matrix) = (vec![0.0f32; rows * width], vec![0.0f32; rows * width]);
        let out = Matrix::dense(&mut by_panels[..], rows, width);
        product(&Team::default(), out, Start::Zero, a, panels.part::<bf16>(row, column), 1.0);
        let out = Matrix::dense(&mut by_matrix[..], rows, width);
        product(&Team::default(), out, Start::Zero, a, Right::Matrix(part), 1.0);
        assert_eq!(by_panels, by_matrix);
    }
}
