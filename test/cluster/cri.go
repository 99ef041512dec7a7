package cluster

import (
	"context"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// CRI connects to the node's container runtime as the kubelet does. The caller
// closes the connection.
func (m *Machine) CRI() (cri.RuntimeServiceClient, cri.ImageServiceClient, *grpc.ClientConn, error) {
	conn, err := grpc.NewClient("unix://"+m.ContainerdSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, nil, fmt.Errorf("connecting to the container runtime of %s: %w", m.Name, err)
	}
	return cri.NewRuntimeServiceClient(conn), cri.NewImageServiceClient(conn), conn, nil
}

func (m *Machine) hasImage(ctx context.Context, ref string) (bool, error) {
	_, service, conn, err := m.CRI()
	if err != nil {
		return false, err
	}
	defer conn.Close()
	answer, err := service.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ref}})
	if err != nil {
		return false, fmt.Errorf("asking the container runtime of %s for image %s: %w", m.Name, ref, err)
	}
	return answer.GetImage() != nil, nil
}
