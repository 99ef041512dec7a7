// Package imds reads the EC2 instance metadata service: who this instance is,
// its user-data and tags, the credentials of its role, and the notices that it
// is about to go away.
//
// It owns every exchange with the service and the meaning of each answer: what
// is absent, what is wrong, and what to do about it. It changes nothing on the
// instance, keeps nothing on disk and acts on no notice; callers do.
//
// Only version 2 of the service is spoken (session tokens). Whatever answers is
// taken for hostile until it was checked: in a pod, or on a machine that is no
// instance, anyone may sit at the link-local address. Answers are bounded, their
// formats strict, redirects and proxies never followed.
//
// Formats: "Instance metadata categories" and "Spot Instance interruption
// notices" of the Amazon EC2 User Guide.
package imds
