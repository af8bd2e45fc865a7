//! What lies where an adapter was looked for and no format reads it: an adapter of another format, one
//! without its config, or something else altogether.

use std::path::PathBuf;
use std::sync::Arc;

use indexmap::IndexMap;
use serde_json::Value;

use super::peft::{self, PICKLED_WEIGHTS, WEIGHTS};
use super::recognize::{self, Kind};
use crate::adapter::format::{Found, GivenScale, Place};
use crate::error::{Error, Owner, Result};
use crate::parallel::task::Task;
use crate::storage::file_names;
use crate::storage::identify::{self, Identity};
use crate::tensor::safetensors::TensorFile;

/// Names that a message lists.
const LISTED: usize = 4;

/// An adapter of a format that is known by name only.
#[derive(Debug)]
pub struct Unread {
    /// What messages call it: the path that was asked for.
    pub path: PathBuf,
    /// Its tensors.
    pub file: Arc<TensorFile>,
    /// What it is.
    pub identity: Identity,
}

impl Unread {
    /// What describes it to a person, as of an adapter that is read.
    pub fn summary(&self) -> IndexMap<&'static str, Value> {
        let unknown = ["base", "r", "alpha", "peft_version"].map(|field| (field, Value::Null));
        let known = [("type", self.identity.what.as_str().into()), ("rslora", false.into())];
        IndexMap::from_iter(known.into_iter().chain(unknown))
    }

    /// The error of who needs it read.
    pub fn refusal(&self) -> Error {
        Error::unsupported(&self.path, self.identity.sentence())
    }
}

/// Looks at what no format knows.
///
/// # Errors
/// What is there, where that is no adapter, or one that lacks its config and may not; [`Error::Io`].
pub fn look(place: &Place<'_>, task: &Task) -> Result<Found> {
    let path = place.path();
    let Some(file) = weights(place)? else { return Err(Error::adapter(path, of_place(place))) };
    match recognize::kind_of(&file) {
        Some(Kind::Other(identity) | Kind::Unsure(identity)) => {
            Ok(Found::Unread(Unread { path: path.to_path_buf(), file, identity }))
        }
        Some(Kind::PeftLora) if place.source.scale != GivenScale::Refused => {
            let adapter = peft::read_without_config(place, file, task)?;
            Ok(Found::Adapter(adapter.into()))
        }
        Some(Kind::PeftLora) => Err(Error::adapter(
            path,
            format!(
                "holds no {}; it is a LoRA in PEFT's names, whose scale and kind only that file tells: \
                 put the one that was saved with it beside the weights",
                peft::config::FILE_NAME
            ),
        )),
        None => {
            let first = file.header().tensors.first();
            let first = first.map_or("none", |tensor| tensor.name.as_str());
            let of = format!(
                "its tensors have a model's names, not an adapter's (the first: {first}); give a \
                 model as the base"
            );
            Err(Error::adapter(path, format!("holds no {}; {of}", peft::config::FILE_NAME)))
        }
    }
}

/// Whether what no format knows is still an adapter, by names and headers.
///
/// # Errors
/// [`Error::Io`], or [`Error::Adapter`] for a link that leads nowhere.
pub fn is_adapter(place: &Place<'_>) -> Result<bool> {
    if place.source.pickle.is_some() {
        return Ok(true);
    }
    if place.file.is_none() && (place.has(WEIGHTS)? || place.has(PICKLED_WEIGHTS)?) {
        return Ok(true);
    }
    let named = place.file.as_deref().is_some_and(|file| file == WEIGHTS);
    let found = weights_file(place)?.and_then(|name| place.open(&name).ok());
    Ok(named || found.is_some_and(|file| recognize::kind_of(&file).is_some()))
}

/// Whether a file that lies beside a config could be the weights that belong to it.
pub(super) fn may_be_of_peft(place: &Place<'_>, name: &str) -> bool {
    let is_weights = name.ends_with(".safetensors");
    // What cannot be opened is whoever reads it to tell.
    let kind = || place.open(name).map_or(Some(Kind::PeftLora), |file| recognize::kind_of(&file));
    is_weights && matches!(kind(), Some(Kind::PeftLora | Kind::Unsure(_)))
}

/// What a safetensors file of a directory is by its keys, in words.
pub(super) fn kind_in(place: &Place<'_>, name: &str) -> Option<String> {
    let file = place.open(name).ok()?;
    recognize::kind_of(&file).map(|kind| kind.what().to_owned())
}

/// The weights that were asked for, opened, where there are some.
fn weights(place: &Place<'_>) -> Result<Option<Arc<TensorFile>>> {
    if place.source.pickle.is_some() {
        return place.pickled().map(Some);
    }
    match weights_file(place)? {
        Some(name) => place.open(&name).map(Some),
        None => Ok(None),
    }
}

/// The safetensors file that was asked for, or the one that a directory has.
fn weights_file(place: &Place<'_>) -> Result<Option<String>> {
    let is_weights = |name: &String| name.ends_with(".safetensors");
    if let Some(file) = &place.file {
        return Ok(Some(file.clone()).filter(is_weights));
    }
    if place.has(WEIGHTS)? {
        return Ok(Some(WEIGHTS.to_owned()));
    }
    let [config, ..] = file_names::OF_A_MODEL;
    if place.store.is_file(config) {
        return Ok(None);
    }
    let mut names = place.store.list()?.into_iter().filter(is_weights);
    let only = names.next();
    Ok(only.filter(|_| names.next().is_none()))
}

/// What a place without weights that can be opened is.
fn of_place(place: &Place<'_>) -> String {
    let config = peft::config::FILE_NAME;
    if let Some(file) = &place.file {
        if file == config {
            return "is the config of an adapter; give the directory that it lies in".to_owned();
        }
        return match identify::of_file(&*place.store, file) {
            Some(found) => found.sentence(),
            None => "is no adapter: neither a directory nor a .safetensors file".to_owned(),
        };
    }
    if let Some(found) = identify::of_folder(&*place.store, Owner::Adapter) {
        return found.sentence();
    }
    let mut weights = place.store.list().unwrap_or_default();
    weights.retain(|name| file_names::holds_weights(name));
    weights.sort();
    if weights.len() > 1 {
        let more = if weights.len() > LISTED { ", …" } else { "" };
        let listed = weights[..weights.len().min(LISTED)].join(", ");
        return format!(
            "holds no {config}, but {} weights files; give one of them: {listed}{more}",
            weights.len()
        );
    }
    if let Some(only) = weights.first() {
        return format!("holds no {config}, only {only}; give that file");
    }
    format!("holds no {config} and no {WEIGHTS}; it is no PEFT adapter")
}
