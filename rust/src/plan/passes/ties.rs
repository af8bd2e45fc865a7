//! The tied pair's passes: which of the two an adapter changes, and whether they stay tied.
//!
//! A tied pair is one tensor on disk and two modules in memory, which an adapter can change each on
//! its own: LoRA and `modules_to_save` leave the other module as it was. So the pair is planned as
//! two tensors that begin alike, the head's standing in for one that the base may not hold. If both
//! end alike, they stay tied and the head is not written; if not, it is written out.
//!
//! PEFT's own merge adds every update to the one shared tensor, also where the model that was
//! trained did not (`compat = "peft"`).

use crate::adapter::factors::Pair;
use crate::adapter::{LayerKind, zero};
use crate::error::Result;
use crate::kernel::convert::widen_f64;
use crate::plan::context::{AdapterContext, Context};
use crate::plan::draft::{
    AdapterTensor, Messages, NewTensor, TensorChange, TensorChanges, Vocabulary,
};
use crate::plan::tie::is_head;
use crate::plan::update::{Update, UpdateKind};
use crate::plan::value::{Inputs, Origin};
use crate::tensor::safetensors::same_bytes;

/// The tensors that a saved parameter stands in for. `modules_to_save` trains a copy of a module;
/// any other saved parameter is the one that the pair shares. `is_untied` becomes true where the
/// adapter gives one of the two a tensor of its own.
pub(in crate::plan) fn replaced_by(
    adapter: &AdapterContext<'_>,
    name: &str,
    trained_apart: bool,
    is_untied: &mut bool,
) -> Vec<String> {
    let mut names = vec![name.to_owned()];
    let tie = adapter.plan.tie.as_ref();
    let Some(other) = tie.and_then(|tie| tie.other(name)) else { return names };
    if !trained_apart && !*is_untied {
        names.push(other.to_owned());
    } else if !adapter.adapter.semantics().ties_weights {
        *is_untied = true;
    }
    names
}

/// The tensors that an update of one weight changes.
///
/// # Errors
/// In words, where the modules that share it cannot be told apart on disk.
pub(in crate::plan) fn updated_by(
    context: &Context<'_>,
    module: &str,
    name: &str,
    is_untied: bool,
) -> Result<Vec<String>, String> {
    let mut names = vec![name.to_owned()];
    let Some(tie) = &context.tie else { return Ok(names) };
    let Some(other) = tie.other(name) else { return Ok(names) };
    if context.is_for_peft() {
        if !is_untied {
            names.push(other.to_owned());
        }
    } else if tie.shared_widely {
        return Err(format!(
            "its module {module} shares {} with more than one other module, and only it was \
             trained; no checkpoint of this architecture can hold that. PEFT's merge changes \
             all of them: compat=\"peft\" (--compat peft) does the same",
            tie.embedding
        ));
    }
    Ok(names)
}

/// The tensors of which trained rows replace those. A head follows the embeddings that it is tied
/// to, unless it has trained rows of its own.
pub(in crate::plan) fn rows_replaced_by(
    adapter: &AdapterContext<'_>,
    name: &str,
    is_untied: bool,
) -> Vec<String> {
    let mut names = vec![name.to_owned()];
    let Some(tie) = adapter.plan.tie.as_ref().filter(|_| !is_untied) else { return names };
    let rows = adapter.adapter.trained_rows();
    let head_has_own = rows.iter().any(|rows| is_head(&format!("{}.weight", rows.path)));
    let follows = name == tie.embedding && !head_has_own;
    if follows || adapter.plan.is_for_peft() {
        names.extend(tie.other(name).map(str::to_owned));
    }
    names
}

/// What becomes of the pair.
#[derive(Default)]
pub(in crate::plan) struct ResolvedTie {
    /// Whether the two differ from now on.
    pub is_untied: bool,
    /// The head, where it has to be written out.
    pub head: Option<NewTensor>,
}

/// Decides whether the pair stays tied.
///
/// # Errors
/// That a file changed meanwhile, or [`crate::Error::Io`].
pub(in crate::plan) fn resolve(
    context: &Context<'_>,
    changes: &mut TensorChanges,
    vocabulary: &Vocabulary,
    messages: &mut Messages,
) -> Result<ResolvedTie> {
    let tied = Ok(ResolvedTie::default());
    let Some(tie) = &context.tie else { return tied };
    let of = |name: &String| {
        let mut change = changes.get(name).cloned().unwrap_or_default();
        // PEFT goes through the model's modules in order, and the embeddings stand first.
        let of_head = |update: &Update| is_head(&format!("{}.weight", update.module));
        change.updates.sort_by_key(|update| (update.adapter, of_head(update)));
        change
    };
    let (embedding, head) = (of(&tie.embedding), of(&tie.head));
    if !tie.stored {
        changes.take(&tie.head);
    }
    if embedding.is_empty() && head.is_empty() {
        return tied;
    }
    if is_same(context.inputs, &embedding, &head)? {
        messages.note(format!(
            "{} and the head that is tied to it change alike and stay tied",
            tie.embedding
        ));
        if tie.stored {
            changes.set(tie.head.clone(), embedding.clone());
        }
        changes.set(tie.embedding.clone(), embedding);
        return tied;
    }
    // The model that was trained may have had another head.
    if !tie.has_head && head.is_empty() {
        return tied;
    }
    if tie.shared_widely {
        messages.problem(format!(
            "{} and the head that is tied to it would no longer be one tensor, which this \
             architecture cannot do without computing something else",
            tie.embedding
        ));
        return tied;
    }
    if !tie.stored && context.quantized.get(&tie.embedding).is_some() {
        messages.problem(format!(
            "{} is quantised, and the head that is tied to it would have to be written beside \
             it; merge into the unquantised base instead",
            tie.embedding
        ));
        return tied;
    }
    if let (Some(size), None) = (vocabulary.size(), &head.origin) {
        messages.problem(format!(
            "the vocabulary changes from {} to {} tokens, but no adapter brings the head \
             that {} is no longer tied to",
            size.old, size.new, tie.embedding
        ));
    }
    messages.note(format!(
        "{} differs from {}, to which it was tied; both are written out, and \
         tie_word_embeddings becomes false",
        tie.head, tie.embedding
    ));
    if tie.stored {
        return Ok(ResolvedTie { is_untied: true, head: None });
    }
    let output_dtype = context.options.dtype.clone().unwrap_or_else(|| tie.tensor.dtype.clone());
    let (origin, source) = match head.origin {
        Some(tensor) => (Origin::Adapter(tensor.adapter), tensor.info),
        None => (Origin::Base(tie.shard), tie.tensor.clone()),
    };
    let head = NewTensor {
        name: tie.head.clone(),
        origin,
        home: Some(tie.shard),
        source,
        output_dtype,
        updates: head.updates,
    };
    Ok(ResolvedTie { is_untied: true, head: Some(head) })
}

/// Whether two changes make the same of the same tensor. Products that are zero count for nothing.
fn is_same(inputs: &Inputs, left: &TensorChange, right: &TensorChange) -> Result<bool> {
    let same_origin = match (&left.origin, &right.origin) {
        (None, None) => true,
        (Some(left), Some(right)) => {
            let file = |tensor: &AdapterTensor| inputs.adapters[tensor.adapter].file().as_ref();
            same_bytes((file(left), &left.info), (file(right), &right.info))?
        }
        _ => false,
    };
    if !same_origin {
        return Ok(false);
    }
    let (left, right) = (effective(inputs, left)?, effective(inputs, right)?);
    if left.len() != right.len() {
        return Ok(false);
    }
    for (left, right) in left.iter().zip(right) {
        if !is_same_update(inputs, left, right)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The updates that change something.
fn effective<'c>(inputs: &Inputs, change: &'c TensorChange) -> Result<Vec<&'c Update>> {
    let mut effective = Vec::new();
    for update in &change.updates {
        let adapter = &inputs.adapters[update.adapter];
        if update.kind != UpdateKind::LowRank
            || zero::cause(adapter, &adapter.modules()[&update.module])?.is_none()
        {
            effective.push(update);
        }
    }
    Ok(effective)
}

fn is_same_update(inputs: &Inputs, left: &Update, right: &Update) -> Result<bool> {
    let adapter = &inputs.adapters[left.adapter];
    if (left.adapter, left.kind) != (right.adapter, right.kind)
        || left.scale != right.scale
        || left.weight != right.weight
        || left.slice != right.slice
    {
        return Ok(false);
    }
    if left.module == right.module {
        return Ok(true);
    }
    match left.kind {
        UpdateKind::Replace => {
            match (adapter.tensor(&left.module), adapter.tensor(&right.module)) {
                (Some(left), Some(right)) => left.has_same_bytes(&right),
                (left, right) => Ok(left.is_none() && right.is_none()),
            }
        }
        UpdateKind::LowRank => {
            let (left, right) =
                (&adapter.modules()[&left.module], &adapter.modules()[&right.module]);
            // An embedding's factors are the transposes of a linear layer's.
            let are_transposed =
                (left.kind == LayerKind::Embedding) != (right.kind == LayerKind::Embedding);
            Ok(are_transposed
                && is_transpose(&left.pair(None, None, None)?, &right.pair(None, None, None)?))
        }
        UpdateKind::Dora | UpdateKind::Vector | UpdateKind::Transform => Ok(false),
    }
}

/// Whether one product is the transpose of another, factor by factor.
fn is_transpose(left: &Pair, right: &Pair) -> bool {
    if (left.rank, left.outputs, left.inputs) != (right.rank, right.inputs, right.outputs) {
        return false;
    }
    let values =
        |pair: &Pair| (widen_f64(&pair.a_dtype, &pair.a), widen_f64(&pair.b_dtype, &pair.b));
    let ((a, b), (other_a, other_b)) = (values(left), values(right));
    let is_equal = |values: &[f64], transposed: &[f64], rows: usize, columns: usize| {
        (0..rows).all(|row| {
            (0..columns)
                .all(|column| values[row * columns + column] == transposed[column * rows + row])
        })
    };
    is_equal(&a, &other_b, left.rank, left.inputs)
        && is_equal(&b, &other_a, left.outputs, left.rank)
}
