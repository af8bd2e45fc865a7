//! The pass over the files beside the weights: which of the base's and of the adapters' go into the
//! output, and what of the adapters' stays behind that a user of the output would miss.

use serde_json::{Map, Value};

use crate::adapter::Directory;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::side_files;
use crate::checkpoint::tokenizer::{self, Tokenizer, Vocabulary};
use crate::error::Result;
use crate::plan::context::Context;
use crate::plan::draft::{Messages, TensorChanges};
use crate::plan::options::TokenizerChoice;
use crate::plan::tie;
use crate::plan::update::UpdateKind;
use crate::plan::value::{ConfigChanges, FileOrigin, SideFile, SideFiles};
use crate::storage::store::Store;

/// The base's own card, as it is called beside that of a merge.
pub const CARD_OF_BASE: &str = "README.base.md";
/// A model's card.
pub const CARD: &str = "README.md";
/// What a card of a merge holds, and no other.
const MARK: &[u8] = b"<!-- Written by lorafast merge -->";
/// ModelOpt's description of quantised weights.
const QUANTIZATION: &str = "hf_quant_config.json";
/// Settings of a model beside its weights and its tokenizer.
const CONFIGS: [&str; 5] = [
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
];
/// What their writers note in configs without meaning.
const NOTES_OF_WRITERS: [&str; 4] =
    ["transformers_version", "_from_model_config", "processor_class", "_valid_processor_keys"];

/// The files of the base that go with its weights.
///
/// # Errors
/// Those of [`side_files::list`].
pub(in crate::plan) fn of_base(base: &Checkpoint) -> Result<SideFiles> {
    let found = side_files::list(base)?;
    let of_base = |(name, stamp)| SideFile { source: None, name, origin: FileOrigin::Base, stamp };
    Ok(SideFiles {
        carried: found.carried.into_iter().map(of_base).collect(),
        left_out: found.left_out,
    })
}

/// Decides on every file beside the weights.
///
/// # Errors
/// [`crate::Error::Io`] if a file cannot be read, and those of [`side_files::list`].
pub(in crate::plan) fn resolve(
    context: &Context<'_>,
    changes: &TensorChanges,
    rows: Rows,
    config_changes: &ConfigChanges,
    messages: &mut Messages,
) -> Result<SideFiles> {
    let mut files = of_base(context.base)?;
    if config_changes.unquantized {
        files.carried.retain(|file| file.name != QUANTIZATION);
    }
    if context.options.subtract {
        restore_card(context.base.store(), &mut files)?;
        return Ok(files);
    }
    if !context.base.is_directory() {
        return Ok(files);
    }
    let found = tokenizers(context)?;
    if context.base.pipeline().is_some() {
        // Each of its tokenizers is a component of its own, which an adapter's cannot be told to
        // stand for.
        keep_tokenizers(context, &found, messages);
        return Ok(files);
    }
    let trains_rows =
        context.inputs.adapters.iter().any(|adapter| !adapter.trained_rows().is_empty());
    let is_needed = !found.is_empty() || trains_rows || rows.before != rows.after;
    let own = if is_needed { Tokenizer::read(context.base.store())? } else { None };
    let candidates = candidates(context, changes, own.as_ref(), found);
    let choice = Choice { context, own: own.as_ref(), rows };
    let chosen = choice.make(&candidates, messages);
    if let Some(candidate) = chosen {
        take(candidate, &mut files)?;
    }
    choice.warn_of_unknown_rows(chosen, messages);
    for candidate in &candidates {
        if chosen.is_none_or(|chosen| chosen.position != candidate.position) {
            warn_of_differences(own.as_ref(), candidate, messages);
        }
    }
    for adapter in &context.inputs.adapters {
        let Some(directory) = adapter.directory().map(Directory::store) else { continue };
        for name in CONFIGS {
            if differs(context.base.store(), directory, name)? {
                messages.warn(format!(
                    "{}: its {name} is not the base's; the output has the base's, so copy the \
                     adapter's into it where that is wanted",
                    adapter.path().display()
                ));
            }
        }
    }
    files.carried.sort_by(|left, right| left.name.cmp(&right.name));
    Ok(files)
}

/// The input embeddings' rows, before the merge and after it.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::plan) struct Rows {
    pub before: Option<u64>,
    pub after: Option<u64>,
}

/// Says that a pipeline keeps its own tokenizers.
fn keep_tokenizers(context: &Context<'_>, found: &[(usize, Tokenizer)], messages: &mut Messages) {
    for (position, _) in found {
        let path = context.inputs.adapters[*position].path().display();
        match context.options.tokenizer {
            TokenizerChoice::Adapter => messages.problem(format!(
                "{path}: its tokenizer was asked for (tokenizer=\"adapter\"), but the base is a \
                 pipeline, whose tokenizers are components of their own; copy it into the right one \
                 afterwards"
            )),
            _ => messages.note(format!(
                "{path}: has a tokenizer; the output keeps those of the pipeline's components"
            )),
        }
    }
}

/// An adapter that has a tokenizer.
struct Candidate<'a> {
    position: usize,
    label: String,
    directory: &'a dyn Store,
    tokenizer: Tokenizer,
    /// Whether its tokens are the base's.
    is_same: bool,
    vocabulary: Vocabulary,
    /// Whether rows of the merged embeddings are its own.
    brings_rows: bool,
}

/// The tokenizers of adapters, with the adapters' positions.
fn tokenizers(context: &Context<'_>) -> Result<Vec<(usize, Tokenizer)>> {
    let mut found = Vec::new();
    for (position, adapter) in context.inputs.adapters.iter().enumerate() {
        if let Some(directory) = adapter.directory().map(Directory::store)
            && let Some(tokenizer) = Tokenizer::read(directory)?
        {
            found.push((position, tokenizer));
        }
    }
    Ok(found)
}

fn candidates<'a>(
    context: &Context<'a>,
    changes: &TensorChanges,
    own: Option<&Tokenizer>,
    tokenizers: Vec<(usize, Tokenizer)>,
) -> Vec<Candidate<'a>> {
    let mut candidates = Vec::new();
    let mut own_vocabulary = None;
    for (position, tokenizer) in tokenizers {
        let adapter = &context.inputs.adapters[position];
        let Some(directory) = adapter.directory().map(Directory::store) else { continue };
        let same_files = own.is_some_and(|own| own.has_same_files(&tokenizer));
        let vocabulary = if same_files { Vocabulary::default() } else { tokenizer.vocabulary() };
        let is_same = same_files
            || !tokenizer.has_tokens()
            || own.is_some_and(|own| {
                *own_vocabulary.get_or_insert_with(|| own.vocabulary()) == vocabulary
            });
        candidates.push(Candidate {
            position,
            label: adapter.path().display().to_string(),
            directory,
            tokenizer,
            is_same,
            vocabulary,
            brings_rows: brings_rows(position, changes),
        });
    }
    candidates
}

/// Whether an adapter's own tensor stands in the place of rows of what has one for each token.
fn brings_rows(position: usize, changes: &TensorChanges) -> bool {
    changes.iter().filter(|(name, _)| tie::is_of_vocabulary(name)).any(|(_, change)| {
        change.origin.as_ref().is_some_and(|origin| origin.adapter == position)
            || change
                .updates
                .iter()
                .any(|update| update.adapter == position && update.kind == UpdateKind::Replace)
    })
}

struct Choice<'a> {
    context: &'a Context<'a>,
    own: Option<&'a Tokenizer>,
    rows: Rows,
}

impl Choice<'_> {
    /// The adapter whose tokenizer the output has; `None` for the base's.
    fn make<'c>(
        &self,
        candidates: &'c [Candidate<'c>],
        messages: &mut Messages,
    ) -> Option<&'c Candidate<'c>> {
        match self.context.options.tokenizer {
            TokenizerChoice::Base => None,
            TokenizerChoice::Adapter => {
                if candidates.is_empty() {
                    messages.problem(
                        "the adapter's tokenizer was asked for (tokenizer=\"adapter\"), but none \
                         of the adapters has one in its directory"
                            .into(),
                    );
                }
                let all: Vec<_> = candidates.iter().collect();
                let chosen = one_of(&all, messages)?;
                if let Some((size, rows)) = self.excess(chosen) {
                    messages.warn(format!(
                        "{}: its tokenizer, which was asked for, has ids up to {}, but the merged \
                         embeddings have {rows} rows",
                        chosen.label,
                        size - 1
                    ));
                }
                Some(chosen)
            }
            TokenizerChoice::Auto => {
                let differing: Vec<_> =
                    candidates.iter().filter(|candidate| !candidate.is_same).collect();
                let (fitting, others): (Vec<_>, Vec<_>) =
                    differing.into_iter().partition(|candidate| self.fits(candidate));
                for candidate in others {
                    messages.warn(self.why_not(candidate));
                }
                let chosen = one_of(&fitting, messages)?;
                messages.note(format!(
                    "{}: the output has its tokenizer, of which the merged embeddings have all \
                     tokens",
                    chosen.label
                ));
                Some(chosen)
            }
        }
    }

    /// Whether the merged embeddings have its vocabulary.
    fn fits(&self, candidate: &Candidate<'_>) -> bool {
        match candidate.vocabulary.size() {
            Some(size) => self.rows.after.is_some_and(|rows| size <= rows),
            None => candidate.brings_rows,
        }
    }

    /// The number of ids and that of rows, where there are more ids.
    fn excess(&self, candidate: &Candidate<'_>) -> Option<(u64, u64)> {
        let (size, rows) = (candidate.vocabulary.size()?, self.rows.after?);
        (size > rows).then_some((size, rows))
    }

    fn why_not(&self, candidate: &Candidate<'_>) -> String {
        let label = &candidate.label;
        let kept = match self.own {
            Some(_) => "the output has the base's",
            None => "the output has none",
        };
        match self.excess(candidate) {
            Some((size, rows)) => format!(
                "{label}: its tokenizer has ids up to {}, but the merged embeddings have {rows} \
                 rows; {kept}",
                size - 1
            ),
            None => format!(
                "{label}: its tokenizer is not the base's, and whether the merged embeddings have \
                 its tokens cannot be told; {kept} (tokenizer=\"adapter\" takes it)"
            ),
        }
    }

    /// Warns where rows were brought that no token of the output's tokenizer stands for.
    fn warn_of_unknown_rows(&self, chosen: Option<&Candidate<'_>>, messages: &mut Messages) {
        let size = match (chosen, self.own) {
            (Some(chosen), _) if !chosen.is_same => chosen.vocabulary.size(),
            (_, Some(own)) if self.needs_size() => own.vocabulary().size(),
            (_, Some(_)) => None,
            (_, None) => Some(0),
        };
        let Some(size) = size else { return };
        if let Rows { before: Some(before), after: Some(after) } = self.rows
            && after > before
            && size <= before
        {
            messages.warn(format!(
                "the merged embeddings have {after} rows, {} more than the base's, and no \
                 tokenizer knows the new ones; put the tokenizer that the adapter was trained with \
                 beside its weights",
                after - before
            ));
            return;
        }
        if size == 0 {
            return;
        }
        for adapter in &self.context.inputs.adapters {
            let rows = adapter
                .trained_rows()
                .iter()
                .filter(|rows| tie::is_of_vocabulary(&format!("{}.weight", rows.path)));
            let unknown = rows.flat_map(|rows| &rows.rows).filter(|row| **row >= size).min();
            if let Some(row) = unknown {
                messages.warn(format!(
                    "{}: trained the embedding of token {row}, which the output's tokenizer does \
                     not know; put the tokenizer that the adapter was trained with beside its \
                     weights",
                    adapter.path().display()
                ));
            }
        }
    }

    /// Whether the size of the base's vocabulary is of any interest.
    fn needs_size(&self) -> bool {
        self.rows.before < self.rows.after
            || self.context.inputs.adapters.iter().any(|adapter| !adapter.trained_rows().is_empty())
    }
}

/// The one whose tokenizer is taken: of those that brought rows, if any did. Where two of them differ, that
/// is a problem.
fn one_of<'c>(
    candidates: &[&'c Candidate<'c>],
    messages: &mut Messages,
) -> Option<&'c Candidate<'c>> {
    let bringing: Vec<_> =
        candidates.iter().copied().filter(|candidate| candidate.brings_rows).collect();
    let of = if bringing.is_empty() { candidates.to_vec() } else { bringing };
    // The one that knows all tokens of the others.
    let widest = of.iter().max_by_key(|candidate| candidate.vocabulary.size()).copied()?;
    for other in &of {
        let is_known =
            widest.vocabulary.includes(&other.vocabulary) || widest.is_same && other.is_same;
        if !is_known {
            messages.problem(format!(
                "{} and {} have different tokenizers, and the output can have one; merge them \
                 apart, or decide with tokenizer=\"base\" (--tokenizer base)",
                widest.label, other.label
            ));
            return None;
        }
    }
    Some(widest)
}

/// Puts an adapter's tokenizer in the place of the base's.
fn take(candidate: &Candidate<'_>, files: &mut SideFiles) -> Result<()> {
    let has_template = !candidate.tokenizer.templates().is_empty();
    let has_tokens = candidate.tokenizer.has_tokens();
    let is_replaced = |name: &str| {
        let is_template = tokenizer::is_template(name);
        // A template alone replaces the template, tokens without one leave it.
        tokenizer::is_file_of_one(name) && if is_template { has_template } else { has_tokens }
    };
    files.carried.retain(|file| !is_replaced(&file.name));
    for name in candidate.tokenizer.names() {
        files.carried.retain(|file| file.name != name);
        files.carried.push(SideFile {
            name: name.to_owned(),
            source: None,
            origin: FileOrigin::Adapter(candidate.position),
            stamp: candidate.directory.stamp(name)?,
        });
    }
    Ok(())
}

/// Warns of what an adapter's tokenizer does in another way than that of the base, which stays.
fn warn_of_differences(
    own: Option<&Tokenizer>,
    candidate: &Candidate<'_>,
    messages: &mut Messages,
) {
    let label = &candidate.label;
    let templates = candidate.tokenizer.templates();
    let own_templates = own.map(Tokenizer::templates).unwrap_or_default();
    let way = "give tokenizer=\"adapter\" (--tokenizer adapter) to have the adapter's";
    if !templates.is_empty() && templates != own_templates {
        messages.warn(if own_templates.is_empty() {
            format!("{label}: has a chat template, and the base has none; {way}")
        } else {
            format!("{label}: its chat template is not the base's, which the output has; {way}")
        });
    }
    let own = own.map(Tokenizer::encoding_settings).unwrap_or_default();
    for (name, value) in candidate.tokenizer.encoding_settings() {
        if let Some(before) = own.get(name).filter(|before| **before != value) {
            messages.warn(format!(
                "{label}: the {name} of its tokenizer is {value}, but {before} of the base's, \
                 which the output has; {way}"
            ));
        }
    }
}

/// Whether two stores have a config of that name with different settings.
fn differs(base: &dyn Store, adapter: &dyn Store, name: &str) -> Result<bool> {
    if !adapter.is_file(name) || !base.is_file(name) {
        return Ok(false);
    }
    let settings = |store: &dyn Store| -> Result<Option<Map<String, Value>>> {
        let (text, _) = store.read_small(name)?;
        let parsed: Option<Map<String, Value>> = serde_json::from_slice(&text).ok();
        Ok(parsed.map(|mut settings| {
            settings.retain(|name, _| !NOTES_OF_WRITERS.contains(&name.as_str()));
            settings
        }))
    };
    Ok(settings(base)? != settings(adapter)?)
}

/// Gives a model that was merged the card of its base back, where that is kept beside it, and takes
/// the merge's own away.
fn restore_card(store: &dyn Store, files: &mut SideFiles) -> Result<()> {
    if let Some(position) = files.carried.iter().position(|file| file.name == CARD_OF_BASE) {
        let kept = files.carried.remove(position);
        files.carried.retain(|file| file.name != CARD);
        files.carried.push(SideFile {
            name: CARD.to_owned(),
            source: Some(CARD_OF_BASE.to_owned()),
            ..kept
        });
        files.carried.sort_by(|left, right| left.name.cmp(&right.name));
    } else if let Some(position) = files.carried.iter().position(|file| file.name == CARD) {
        let (text, _) = store.read_small(CARD)?;
        if text.windows(MARK.len()).any(|part| part == MARK) {
            files.carried.remove(position);
            files.left_out.push(CARD.to_owned());
            files.left_out.sort();
        }
    }
    Ok(())
}
