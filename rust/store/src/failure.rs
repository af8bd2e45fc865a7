//! Errors of stores in words: which object, what was wanted of it, and what to do.

use std::error::Error as StdError;

use lorafast::Error;
use object_store::path::Path as ObjectPath;

use crate::address::{Address, Kind};

/// What was asked of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    List,
    Read,
    Write,
    Delete,
}

impl Action {
    fn words(self) -> &'static str {
        match self {
            Self::List => "could not be listed",
            Self::Read => "could not be read",
            Self::Write => "could not be written",
            Self::Delete => "could not be removed",
        }
    }

    /// What a policy calls the permission.
    fn permission(self, kind: Kind) -> &'static str {
        match (kind, self) {
            (Kind::S3, Self::List) => "s3:ListBucket",
            (Kind::S3, Self::Read) => "s3:GetObject",
            (Kind::S3, Self::Write) => "s3:PutObject",
            (Kind::S3, Self::Delete) => "s3:DeleteObject",
            (Kind::Gcs, Self::List) => "storage.objects.list",
            (Kind::Gcs, Self::Read) => "storage.objects.get",
            (Kind::Gcs, Self::Write) => "storage.objects.create",
            (Kind::Gcs, Self::Delete) => "storage.objects.delete",
            (Kind::Azure, Self::List) => "Storage Blob Data Reader (list)",
            (Kind::Azure, Self::Read) => "Storage Blob Data Reader",
            (Kind::Azure, Self::Write | Self::Delete) => "Storage Blob Data Contributor",
            (Kind::Http, _) => "to read it",
        }
    }
}

/// The error for what a store answered, or did not.
pub(crate) fn explain(
    address: &Address,
    path: &ObjectPath,
    action: Action,
    error: &object_store::Error,
) -> Error {
    let name = address.shown(path);
    if let object_store::Error::Generic { source, .. } = error
        && let Some(own) = source.downcast_ref::<Words>()
    {
        return Error::store(name, own.0.clone());
    }
    let text = chain(error);
    let has = |code: &str| text.contains(code);
    let (kind, bucket) = (address.kind, &address.bucket);
    let option = match kind {
        Kind::S3 => "skip_signature=true",
        Kind::Gcs => "google_skip_signature=true",
        Kind::Azure => "azure_skip_signature=true",
        Kind::Http => "",
    };
    let advice = if has("NoSuchBucket")
        || has("ContainerNotFound")
        || has("The specified bucket does not exist")
    {
        format!("there is no bucket {bucket}; check its name, the endpoint and the region")
    } else if has("ExpiredToken") || has("TokenRefreshRequired") || has("token has expired") {
        "the credentials have expired; give fresh ones, or a credential_provider that renews them, and run again".to_owned()
    } else if has("InvalidAccessKeyId")
        || has("SignatureDoesNotMatch")
        || has("InvalidSecurity")
        || has("AuthenticationFailed")
    {
        "the store does not accept the credentials; check key and secret, and that they belong to this endpoint".to_owned()
    } else if has("AuthorizationHeaderMalformed")
        || has("PermanentRedirect")
        || has("redirect without LOCATION")
        || has("IllegalLocationConstraint")
    {
        "the bucket lies in another region; give the right one as aws_region in storage_options"
            .to_owned()
    } else if has("QuotaExceeded")
        || has("EntityTooLarge")
        || has("507 Insufficient")
        || has("XMinioStorageFull")
    {
        "the store has no room for it; make room or raise the quota, and run again".to_owned()
    } else {
        match error {
            object_store::Error::NotFound { .. } => {
                return Error::io(name, std::io::Error::from_raw_os_error(NO_SUCH_FILE));
            }
            _ if matches!(error, object_store::Error::PermissionDenied { .. }) || has("403 Forbidden") => match kind {
                Kind::Http if address.query.is_some() => {
                    "the server refuses it (403); the signature of the URL has expired, or is of another file: make a new one".to_owned()
                }
                Kind::Http => "the server refuses it (403); check the address and the user".to_owned(),
                _ => format!(
                    "permission denied: {} is needed; of a public bucket, {option} reads without credentials",
                    action.permission(kind)
                ),
            },
            _ if matches!(error, object_store::Error::Unauthenticated { .. }) || has("401 Unauthorized") => match kind {
                Kind::Http => "the server asks for a user and a password (401); give them as user:password@ before the host".to_owned(),
                _ => format!("the store accepts no such credentials; of a public bucket, {option} reads without any"),
            },
            object_store::Error::Precondition { .. } => "changed meanwhile; run again when nobody writes to it".to_owned(),
            object_store::Error::AlreadyExists { .. } => "is there already, written by somebody else".to_owned(),
            _ if has("non-partial response") || has("Range request not supported") => {
                "the server ignores ranges and would send all of it for each; fetch the files, or use a server that answers ranges".to_owned()
            }
            _ if has("is not allowed") && has("scheme") => {
                "the endpoint is http:// and not on this machine; allow_http=true in storage_options permits that".to_owned()
            }
            _ if has("invalid peer certificate") || has("UnknownIssuer") || has("certificate") => format!(
                "the certificate of the server is not trusted ({}); give the authority's as root_certificate (a path) in storage_options, or install the system's (ca-certificates)",
                reason(error)
            ),
            _ => format!("{}; check the network and the endpoint, and run again", reason(error)),
        }
    };
    Error::store(name, format!("{}: {advice}", action.words()))
}

/// What the system calls a file that is not there.
const NO_SUCH_FILE: i32 = 2;

/// A failure that has its own words.
#[derive(Debug)]
pub(crate) struct Words(pub String);

impl std::fmt::Display for Words {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl StdError for Words {}

impl Words {
    /// The same as an error of the crate underneath.
    pub fn into_error(self) -> object_store::Error {
        object_store::Error::Generic { store: "lorafast", source: Box::new(self) }
    }
}

/// What an error and all that it comes from say.
fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text.push('\n');
        text.push_str(&error.to_string());
        next = error.source();
    }
    text
}

/// The reason of an error in a few words, without addresses, in which secrets can stand.
fn reason(error: &dyn StdError) -> String {
    let mut deepest = error;
    while let Some(next) = deepest.source() {
        deepest = next;
    }
    let text = deepest.to_string();
    // Of an answer in XML, what it says.
    let within = |tag: &str| {
        let (_, rest) = text.split_once(&format!("<{tag}>"))?;
        rest.split_once(&format!("</{tag}>")).map(|(content, _)| content.to_owned())
    };
    let said = match (within("Code"), within("Message")) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        (Some(code), None) => code,
        _ => text.lines().next().unwrap_or_default().to_owned(),
    };
    let without: Vec<_> = said
        .split_whitespace()
        .map(|word| {
            if word.contains("://") || word.contains('@') || word.contains("=") {
                "…"
            } else {
                word
            }
        })
        .collect();
    let mut text = without.join(" ");
    if text.chars().count() > 200 {
        text = text.chars().take(200).chain(['…']).collect();
    }
    text
}
