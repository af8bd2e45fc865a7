//! Updates of slices of a stack of matrices, against sums written out.

use std::fs;
use std::sync::Arc;

use super::*;
use crate::adapter::Expert;
use crate::adapter::deltas::Experts;
use crate::fixtures::{open, plain, ramp, write, write_adapter};
use crate::kernel::convert::widen_f64;
use crate::plan::{Action, Slice, Update, UpdateKind};
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::TensorFile;
use crate::verify;

const EXPERTS: usize = 2;
const OUTPUTS: usize = 50;
const INPUTS: usize = 31;

/// How an update enters the expected sum: its rows, its expert, the first output, its weight.
struct Term {
    rows: Range<usize>,
    expert: Option<usize>,
    first_output: usize,
    weight: f64,
    transposed: bool,
}

/// Merges the terms into a stack of two matrices and holds every element against the sum.
fn check(stack: [u64; 3], terms: &[Term]) {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let [count, height, columns] = stack.map(|extent| extent as usize);
    let values = ramp(stack.iter().product(), 3);
    let shape = [OUTPUTS as u64, INPUTS as u64];
    let tensors = [
        ("m.weight", Dtype::F32, &shape[..], ramp(shape[0] * shape[1], 4)),
        ("stack", Dtype::F32, &stack[..], values.clone()),
    ];
    write(&root.join("base/model.safetensors"), &tensors);
    fs::write(root.join("base/config.json"), "{}").expect("written");
    let adapter = write_adapter(&root.join("adapter"), &[("m", shape[0], shape[1])], "");
    let inputs = open(&root.join("base"), &[adapter]);
    let mut plan = Plan::new(&inputs, plain()).expect("fits");
    let plain = inputs.adapters[0].clone();
    let inputs = with_experts(inputs);
    let update = |term: &Term| Update {
        adapter: 0,
        module: "m".into(),
        kind: UpdateKind::LowRank,
        rank: if term.expert.is_some() { 1 } else { 2 },
        scale: 2.0,
        weight: term.weight,
        transposed: term.transposed,
        slice: Slice {
            expert: term.expert.map(|e| Expert { index: e as u64, count: EXPERTS as u64 }),
            outputs: (!term.transposed).then(|| {
                let first = term.first_output as u64;
                first..first + term.rows.len() as u64
            }),
            inputs: None,
            rows: Some(term.rows.start as u64..term.rows.end as u64),
        },
        base_override: None,
        residual: None,
        stage: 0,
    };
    let stacked = plan.shards[0].tensors.iter_mut().find(|tensor| tensor.name == "stack");
    stacked.expect("there").action = Action::Merge(terms.iter().map(update).collect());

    let output = root.join("merged");
    let options = Options { threads: Some(2), ..Options::default() };
    execute(&inputs, &plan, &output, &options, &Task::new()).expect("merged");

    let module = &plain.modules()["m"];
    let (a, b) = module
        .delta
        .plain()
        .map(|(a, b)| (a.read_f64().expect("read"), b.read_f64().expect("read")))
        .expect("plain");
    let file = TensorFile::open(&output.join("model.safetensors")).expect("sound");
    let merged =
        widen_f64(&Dtype::F32, &file.read(file.tensor("stack").expect("there")).expect("read"));
    assert_eq!(merged.len(), count * height * columns);
    let mut changed = 0;
    for (index, merged) in merged.iter().enumerate() {
        let (row, column) = (index / columns, index % columns);
        let mut expected = f64::from(values[index]);
        for term in terms.iter().filter(|term| term.rows.contains(&row)) {
            let row = row - term.rows.start;
            let (output, input) =
                if term.transposed { (column, row) } else { (row + term.first_output, column) };
            for k in 0..2 {
                if term.expert.is_none_or(|expert| expert == k) {
                    let product = b[output * 2 + k] * a[k * INPUTS + input];
                    expected += 2.0 * term.weight * product;
                }
            }
        }
        changed += usize::from(expected != f64::from(values[index]));
        assert!(
            (merged - expected).abs() < 1e-6,
            "row {row}, column {column}: {merged} {expected}"
        );
    }
    assert!(changed > 0);
    let options = verify::Options { full: true, ..verify::Options::default() };
    let proof = verify::verify(&inputs, &plan, &output, &options, &Task::new()).expect("read");
    assert_eq!(proof.problems, Vec::<String>::new());
}

/// The same with the module's factors taken as those of its experts.
fn with_experts(inputs: Inputs) -> Inputs {
    let plain = &inputs.adapters[0];
    let mut modules = plain.modules().clone();
    for module in modules.values_mut() {
        let (a, b) = module.delta.plain().expect("plain");
        let (a, b, shared) = (a.clone(), b.clone(), Arc::default());
        module.delta = Arc::new(Experts { a, b, shared });
    }
    let adapters = vec![Arc::new(plain.renamed(modules, Vec::new(), Vec::new(), plain.grammar()))];
    Inputs { adapters, ..inputs }
}

#[test]
fn experts_of_one_tensor_have_their_own_products() {
    let expert = |e: usize| Term {
        rows: e * OUTPUTS..(e + 1) * OUTPUTS,
        expert: Some(e),
        first_output: 0,
        weight: 1.0,
        transposed: false,
    };
    check([2, OUTPUTS as u64, INPUTS as u64], &[expert(0), expert(1)]);
}

#[test]
fn experts_that_are_stored_turned_have_their_own_products() {
    let expert = |e: usize| Term {
        rows: e * INPUTS..(e + 1) * INPUTS,
        expert: Some(e),
        first_output: 0,
        weight: 1.0,
        transposed: true,
    };
    check([2, INPUTS as u64, OUTPUTS as u64], &[expert(0), expert(1)]);
}

#[test]
fn bands_that_overlap_are_added_and_rows_outside_stay() {
    let row_ranges = [(5..45, 3, 0.5), (30..80, 0, 1.0), (44..47, 40, -2.0)];
    let terms = row_ranges.map(|(rows, first_output, weight)| Term {
        rows,
        expert: None,
        first_output,
        weight,
        transposed: false,
    });
    check([2, 50, INPUTS as u64], &terms);
}
